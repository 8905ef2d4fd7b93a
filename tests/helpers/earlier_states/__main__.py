import sys

from earlier_states import write

write(sys.argv[1])
