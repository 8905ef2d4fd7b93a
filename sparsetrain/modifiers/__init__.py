"""Everything a method can switch on beside masks, one file each, behind one interface."""
