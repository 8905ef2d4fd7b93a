"""AdamW with masks by the reference and by the kernel, against torch's AdamW with masks written out."""

from typing import Any

import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.adamw import RULES, Rule, adamw_, sparse_adamw_
from sparsetrain.kernels.adamw.reference import factors
from sparsetrain.kernels.adamw.triton_kernel import update_in_place
from sparsetrain.kernels.metadata_order import Order
from sparsetrain.kernels.pack import Side, empty_packed
from sparsetrain.kernels.pack.reference import pack_rows
from sparsetrain.kernels.tile_codes import pack_codes

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
DECAY = 0.02
SHAPES = [(4, 4), (12, 20), (8, 68), (4, 4)]
ROW_WISE = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)  # both ways 2:4
EPS = torch.finfo(torch.float32).eps


def mask_of(shape: tuple[int, int]) -> Tensor:
    tiles = [
        torch.cat([ROW_WISE.roll(int(turn), 0) for turn in row], 1)
        for row in torch.randint(4, (shape[0] // 4, shape[1] // 4))
    ]
    return torch.cat(tiles)


def gradient_of(step: int, weight: Tensor) -> Tensor:
    """Of sizes that differ by entry and step."""
    generator = torch.Generator().manual_seed(step)
    size = 10.0 ** torch.randint(-6, 1, weight.shape, generator=generator)
    return (torch.randn(weight.shape, generator=generator) * size).to(weight.dtype)


class ByTorch:
    """``torch.optim.AdamW`` on one weight, with the mask's part written out before and after it."""

    def __init__(self, weight: Tensor, mask: Tensor, rule: Rule, zeros: bool = False, **options: Any) -> None:
        self.weight, self.mask, self.rule, self.zeros = torch.nn.Parameter(weight.clone()), mask, rule, zeros
        self.options = {**OPTIONS, **options}
        self.optimizer = torch.optim.AdamW([self.weight], **self.options)

    def step(self, gradient: Tensor) -> None:
        pruned = torch.where(self.mask, 0.0, self.weight.detach()).to(self.weight.dtype)
        if self.rule == "decay_gradient":
            gradient = gradient + pruned * DECAY
        elif self.rule == "decay_weight":
            self.weight.data += pruned * (-DECAY * self.options["lr"])
        elif self.rule == "shrink_weight":
            self.weight.data += pruned * -DECAY
        elif self.rule == "mask_gradient":
            gradient = gradient * self.mask
        self.weight.grad = gradient.to(self.weight.dtype)
        self.optimizer.step()
        if self.zeros:
            self.weight.data *= self.mask

    @property
    def state(self) -> list[Tensor]:
        moments = self.optimizer.state[self.weight]
        return [self.weight.detach(), moments["exp_avg"], moments["exp_avg_sq"]]


class Ours:
    """The same by the operator (whose CPU path is the reference), or by the kernel."""

    def __init__(self, weight: Tensor, mask: Tensor, rule: Rule, zeros: bool = False, **options: Any) -> None:
        self.state = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
        self.codes, self.rule, self.zeros, self.count = pack_codes(mask), rule, zeros, 0
        options = {**OPTIONS, **options}
        self.maximize = bool(options.get("maximize"))
        self.numbers = options["lr"], *options["betas"], options["eps"], options["weight_decay"]

    def step(self, gradient: Tensor) -> None:
        self.count += 1
        weight, *moments = self.state
        lists = [[weight], [gradient], [moments[0]], [moments[1]], [self.codes], [], [], [], [], []]
        sparse_adamw_(*lists, *self.numbers, float(self.count), None, self.rule, DECAY, self.zeros, self.maximize)

    def kernel_step(self, gradient: Tensor, device: str) -> None:
        self.count += 1
        decay = {"decay_weight": -DECAY * self.numbers[0], "shrink_weight": -DECAY}.get(self.rule, DECAY)
        on_device = [[one.to(device)] for one in (self.state[0], gradient, *self.state[1:], self.codes)]
        weights, gradients, averages, squares, codes = on_device
        lr, beta1, beta2, eps, weight_decay = self.numbers
        sums = factors(lr, beta1, beta2, eps, weight_decay, self.count)
        update_in_place(
            weights, gradients, averages, squares, codes, None, None, [0], sums, self.rule, decay, self.zeros,
            self.maximize, 0,
        )  # fmt: skip
        self.state = [on_device[place][0].cpu() for place in (0, 2, 3)]


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.3, 0.9), "weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_reference_is_torchs_adamw_bit_for_bit(rule: Rule, options: dict[str, Any]) -> None:
    weight, mask = torch.randn(8, 20), mask_of((8, 20))
    zeros = rule == "mask_gradient"
    theirs, ours = ByTorch(weight, mask, rule, zeros, **options), Ours(weight, mask, rule, zeros, **options)
    for step in range(1000 if rule == "decay_gradient" and not options else 20):
        gradient = gradient_of(step, weight)
        before = gradient.clone()
        theirs.step(gradient)
        ours.step(gradient)
        assert torch.equal(gradient, before)
    for mine, other in zip(ours.state, theirs.state, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("rule", ["none", "mask_gradient"])
def test_the_reference_is_torchs_adamw_bit_for_bit_in_bfloat16(rule: Rule) -> None:
    weight, mask = torch.randn(8, 20).bfloat16(), mask_of((8, 20))
    theirs, ours = ByTorch(weight, mask, rule), Ours(weight, mask, rule)
    for step in range(30):
        gradient = gradient_of(step, weight)
        theirs.step(gradient)
        ours.step(gradient)
    for mine, other in zip(ours.state, theirs.state, strict=True):
        assert torch.equal(mine, other)


def off_from_exact(state: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest errors, as shares of the largest entries."""
    return [float((one.double() - two).abs().max() / two.abs().max()) for one, two in zip(state, exact, strict=True)]


@pytest.mark.parametrize(
    ("rule", "options"),
    [(rule, {}) for rule in RULES] + [("decay_gradient", {"maximize": True, "betas": (0.3, 0.9)})],
    ids=str,
)
def test_the_kernel_is_as_near_to_exact_sums_as_torch_is(
    rule: Rule, options: dict[str, Any], kernel_device: str
) -> None:
    """The bound of the library's products: at most twice the error of torch's own float32 against float64."""
    weight, mask = torch.randn(8, 20), mask_of((8, 20))
    zeros = rule == "mask_gradient"
    theirs, ours = ByTorch(weight, mask, rule, zeros, **options), Ours(weight, mask, rule, zeros, **options)
    exact = ByTorch(weight.double(), mask, rule, zeros, **options)
    for step in range(3):
        gradient = gradient_of(step, weight)
        theirs.step(gradient)
        ours.kernel_step(gradient, kernel_device)
        exact.step(gradient.double())
    limits = [max(2 * off, 2 * EPS) for off in off_from_exact(theirs.state, exact.state)]
    assert all(off <= limit for off, limit in zip(off_from_exact(ours.state, exact.state), limits, strict=True))
    if zeros:
        assert not ours.state[0][~mask].any()


@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_rounds_bfloat16_where_torch_does(rule: Rule, kernel_device: str) -> None:
    """A float32 sum beside the middle of two bfloat16 numbers may fall to either side: that is next to no entry."""
    weight, mask = torch.randn(64, 64).bfloat16(), mask_of((64, 64))
    reference, kernel = Ours(weight, mask, rule), Ours(weight, mask, rule)
    for step in range(1, 2):
        gradient = gradient_of(step, weight)
        reference.step(gradient)
        kernel.kernel_step(gradient, kernel_device)
    for mine, other in zip(kernel.state, reference.state, strict=True):
        assert (mine != other).double().mean() < 1e-3
        near(mine, other)


@pytest.mark.parametrize(
    ("source", "target", "sides", "order"),
    [
        ("float32", "bfloat16", "both", Order.NATURAL),
        ("bfloat16", "bfloat16", "both", Order.TABLE),
        ("float32", "float32", "W", Order.TABLE),
        ("bfloat16", "float16", "Wt", Order.NATURAL),
    ],
    ids=str,
)
def test_several_weights_are_updated_and_packed_in_one_launch_a_layout(
    source: str, target: str, sides: str, order: Order, kernel_device: str
) -> None:
    dtype, values_dtype = getattr(torch, source), getattr(torch, target)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    masks = [mask_of(shape) for shape in SHAPES]
    gradients = [gradient_of(step, weight) for step, weight in enumerate(weights)]
    moments = [[torch.rand_like(weight) for weight in weights] for _ in range(2)]
    columns = [weights, gradients, *moments, [pack_codes(mask) for mask in masks]]
    on_device = [[one.clone().to(kernel_device) for one in column] for column in columns]
    side, side_t = (
        side_for(shapes, values_dtype, order, kernel_device) if sides in wanted else None
        for shapes, wanted in ((SHAPES, ("W", "both")), ([shape[::-1] for shape in SHAPES], ("Wt", "both")))
    )
    numbers, sums = [3, 1, 4, 1], factors(3e-3, 0.9, 0.999, 1e-8, 0.1, 7)
    first, second, third, fourth, fifth = on_device
    update_in_place(
        first, second, third, fourth, fifth, side, side_t, numbers, sums, "decay_gradient", DECAY, False, False, 5
    )
    for position, entry in enumerate(zip(*columns, strict=True)):
        adamw_(*entry, sums, "decay_gradient", DECAY, number=numbers[position], clock=5)
        for column in (0, 2, 3):
            near(on_device[column][position], entry[column])
        assert torch.equal(on_device[1][position].cpu(), gradients[position])
        updated = on_device[0][position].cpu()
        for given, matrix, kept in ((side, updated, masks[position]), (side_t, updated.t(), masks[position].t())):
            if given is not None:
                values = matrix[kept].view(matrix.shape[0], -1)  # two of every four of a row
                assert torch.equal(given.values[position].cpu(), values.to(values_dtype))
                meta, words = given.meta[position].cpu().flatten(), pack_rows(kept, kept)[1].flatten()
                places = given.tables[position].cpu().long() if order == Order.TABLE else slice(None)
                assert torch.equal(meta[places], words)


def side_for(shapes: list[tuple[int, ...]], dtype: torch.dtype, order: Order, device: str) -> Side:
    """Targets that hold other values, in natural order or in one that a table tells."""
    words = [(rows, -(-columns // 16)) for rows, columns in shapes]
    values = [torch.full((rows, columns // 2), float("nan"), dtype=dtype, device=device) for rows, columns in shapes]
    meta = [torch.full(size, -1, dtype=torch.int16, device=device) for size in words]
    tables = [torch.randperm(rows * columns).to(device, torch.int32) for rows, columns in words]
    return Side(values, meta, [int(order)] * len(shapes), tables)


def near(found: Tensor, wanted: Tensor) -> None:
    """Equal, but for sums beside the middle of two numbers."""
    relative = 1e-6 if wanted.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=relative, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_around_a_weight_stays_as_it_was(dtype: torch.dtype, kernel_device: str) -> None:
    storages = [torch.full((16, 60), float("nan"), dtype=dtype, device=kernel_device) for _ in range(4)]
    views = [storage[2:14, 3:47] for storage in storages]
    mask = mask_of((12, 44))
    for view in views:
        view.copy_(torch.rand(12, 44))
    reference = [view.cpu().clone() for view in views]
    sums = factors(3e-3, 0.9, 0.999, 1e-8, 0.1, 1)
    codes = pack_codes(mask)
    first, second, third, fourth = ([view] for view in views)
    update_in_place(
        first, second, third, fourth, [codes.to(kernel_device)], None, None, [0], sums, "decay_gradient", DECAY, True,
        False, 0,
    )  # fmt: skip
    adamw_(*reference, codes, sums, "decay_gradient", DECAY, zeros=True)
    for storage, view, wanted in zip(storages, views, reference, strict=True):
        near(view, wanted)
        assert int(storage.isnan().sum()) == storage.numel() - view.numel()


def test_the_operator_passes_opcheck(kernel_device: str, margins: Margins) -> None:
    weights = [torch.randn(12, 20, device=kernel_device), torch.randn(20, 12, device=kernel_device).t()]
    codes = [pack_codes(mask_of((12, 20))).to(kernel_device) for _ in weights]
    packed = [[margins.like(part) for part in empty_packed(one, torch.bfloat16)] for one in weights]
    targets = [list(column) for column in zip(*packed, strict=True)]
    columns = [
        weights,
        [one.sin() for one in weights],
        [one.abs() for one in weights],
        [one.square() for one in weights],
        codes,
    ]
    numbers = (1e-3, 0.9, 0.99, 1e-8, 0.1, 3.0)
    torch.library.opcheck(sparse_adamw_, (*columns, *targets, [], *numbers, None, "decay_weight", 0.1))


TILE = torch.ones(4, 4)
CODE = torch.full((1, 1), 0x5A5A, dtype=torch.int16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "l2"}, "rule is 'l2': it must be one of 'none', 'decay_gradient', 'decay_weight', 'mask_gradient', "),
        ({"gradients": []}, "gradients has 0 entries but weights has 1"),
        ({"numbers": [1, 2]}, "numbers has 2 entries but weights has 1"),
        ({"exp_avgs": [torch.ones(4, 8)]}, r"exp_avgs\[0\] is torch.float32 \(4, 8\)"),
        ({"gradients": [torch.ones(4, 4).double()]}, r"gradients\[0\] is torch.float64"),
        ({"codes": [CODE.long()]}, r"codes\[0\] is torch.int64"),
        ({"values": [torch.zeros(4, 2)]}, r"have \[1, 1, 1, 0, 0, 0\] entries"),
        ({"meta": [CODE.expand(4, 2)], "values": [torch.zeros(4, 2)]}, r"meta\[0\] is torch.int16 \(4, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_changes_nothing(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {name: [TILE.clone()] for name in ("weights", "gradients", "exp_avgs", "exp_avg_sqs")}
    arguments |= {
        "codes": [CODE],
        "values": [],
        "meta": [],
        "values_t": [],
        "meta_t": [],
        "tables": [],
        "lr": 0.1,
        "beta1": 0.9,
    }
    arguments |= {"beta2": 0.9, "epsilon": 1e-8, "weight_decay": 0.1, "step": 1.0, **change}
    with pytest.raises(ValueError, match=words) as caught:
        sparse_adamw_(**arguments)
    assert "\n" not in str(caught.value)
    assert torch.equal(arguments["weights"][0], TILE)


@pytest.mark.parametrize("shape", [(6, 4), (4,)])
def test_weights_that_are_no_tiles_are_refused(shape: tuple[int, ...]) -> None:
    columns = [[torch.ones(shape)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"leave it to torch.optim.AdamW"):
        sparse_adamw_(*columns, [CODE], [], [], [], [], [], 0.1, 0.9, 0.9, 1e-8, 0.1, 1.0)
