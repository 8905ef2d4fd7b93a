"""Run on a machine with a GPU: ``scripts/test -m gpu``."""

import pytest
import torch
from models import mlp, train

import sparsetrain as st

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_have_the_same_bits_as_on_the_cpu(dtype: torch.dtype) -> None:
    for scores in (torch.randn(1028, 2052), torch.randint(-2, 3, (512, 512)).float(), torch.zeros(8, 8)):
        scores = scores.to(dtype)
        assert torch.equal(st.transposable_mask(scores.cuda()).cpu(), st.transposable_mask(scores))
        assert torch.equal(st.nm_mask(scores.cuda()).cpu(), st.nm_mask(scores))


def test_a_training_run_has_the_same_masks_and_nearly_the_same_weights_as_on_the_cpu() -> None:
    runs = []
    for device in ("cpu", "cuda"):
        model = mlp().double().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        method = st.methods.fst(refresh_every=3, decay=0.01, dense_tail=0)
        training = st.SparseTraining(model, optimizer, method, 10, verbose=False)
        train(model, optimizer, 10)
        runs.append({name: codes.cpu() for name, codes in training.masks.codes.items()})
        runs.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])
    torch.testing.assert_close(runs[1], runs[3], rtol=1e-9, atol=1e-9)


def test_a_model_may_move_to_the_gpu_after_it_was_made_sparse() -> None:
    model = mlp()
    st.sparsify_(model, verbose=False)
    x = torch.randn(4, 16)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
