"""What users import, by the module they import it from; a name that goes from here breaks their code."""

import importlib

import pytest

PUBLIC = {
    "sparsetrain": """
        Backend Criterion Fisher GradientRule LayerChoice Magnitude Method Movement Phase PruneMetrics
        Random Schedule SelectionReport SparseConv1d SparseConv2d SparseLinear SparseTraining
        VerificationReport Wanda WeightGradient count_flips decode_tiles dense_prune_retrain detach_pruned
        encode_tiles export_dense_ from_scratch is_nm is_transposable methods nm_mask optim prune_metrics
        read_masks restore_pruned_ scaled select_layers sparse_linear sparse_state_dict sparsify_
        transposable_codes transposable_mask transpose_tiles verify
    """,
    "sparsetrain.masks": "is_nm is_transposable nm_mask transposable_codes transposable_mask",
    "sparsetrain.methods": """
        Method PRESETS asp_one_shot dense_to_sparse_finetune fst iterative recommended resolve_method s_ste
        slope sr_ste step
    """,
    "sparsetrain.criteria": """
        CRITERIA Criterion Fisher Magnitude Movement Random Wanda WeightGradient keep_dense_layers
        keep_dense_tiles resolve_criterion
    """,
    "sparsetrain.backends": """
        BACKENDS Backend CuSparseLtBackend CutlassBackend MaskedBackend Operand TilelangBackend
        resolve_backend
    """,
    "sparsetrain.dispatch": """
        Choice Decision DeviceFaultError DispatchTable MASKED Problem Product Tuner bucket
        describe_environment find_mismatch tuner_for
    """,
    "sparsetrain.training": "SparseTraining",
    "sparsetrain.checkpoint": """
        CHECKPOINT_KEY PRUNED_KEY check_pruned detach_pruned pruned_values read_masks require_pruned
        require_same_weights restore_pruned_ weight_key
    """,
    "sparsetrain.callbacks": "HuggingFaceSparseTraining SparseTrainingCallback",
    "sparsetrain.recipes": "",
    "sparsetrain.kernels": "",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(found, name)] == []
