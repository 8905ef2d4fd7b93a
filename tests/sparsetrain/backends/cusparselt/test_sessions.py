"""Handles, streams and workspaces of cuSPARSELt: one per thread and device, and shared where they may be."""

import threading
from typing import Any

from cusparselt_bench import Bench, C, N, R, assert_close, normal, sparse


def in_a_thread(function: Any) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_two_threads_at_once_have_two_handles_and_an_ended_one_leaves_its_own(bench: Bench) -> None:
    compressed, dense = bench.lt.compress(sparse()), normal(C, N)

    def product() -> None:
        bench.lt.multiply(compressed, (R, C), dense)

    product()
    assert bench.fake.calls["init"] == 1
    in_a_thread(product)
    assert (bench.fake.calls["init"], bench.fake.calls["matmul_plan_init"]) == (2, 2)
    in_a_thread(product)
    assert (bench.fake.calls["init"], bench.fake.calls["matmul_plan_init"]) == (2, 2)
    assert len(bench.fake.launches) == 3


def test_every_device_has_a_handle_and_is_current_in_its_calls(bench: Bench) -> None:
    a, dense = sparse(), normal(C, N)
    for index in (0, 1, 0, 1):
        bench.devices.where = index  # the stand-in refuses a handle of another device
        assert_close(bench.lt.multiply(bench.lt.compress(a), (R, C), dense), a.double() @ dense.double())
    handles = [thing.values["device"] for thing in bench.fake.things.values() if thing.kind == "handle"]
    assert handles == [0, 1]
    assert bench.devices.now == 0


def test_work_goes_to_the_current_stream_with_its_own_workspace(bench: Bench) -> None:
    a, dense = sparse(), normal(C, N)
    for stream in (0, 0x7F0012345678, 0):
        bench.devices.streams[0] = stream
        bench.lt.multiply(bench.lt.compress(a), (R, C), dense)
    assert bench.fake.compress_streams == [0, 0x7F0012345678, 0]
    first, second, third = bench.fake.launches
    assert [first.stream, second.stream, third.stream] == [0, 0x7F0012345678, 0]
    assert first.workspace == third.workspace != second.workspace


def test_a_workspace_grows_and_is_reused(bench: Bench) -> None:
    compressed = bench.lt.compress(sparse())
    for n in (80, 8, 4096, 80):
        bench.lt.multiply(compressed, (R, C), normal(C, n))
    first, small, grown, again = (launch.workspace for launch in bench.fake.launches)
    assert first == small != grown == again


def test_threads_share_the_workspace_of_a_stream(bench: Bench) -> None:
    compressed, dense = bench.lt.compress(sparse()), normal(C, N)
    bench.lt.multiply(compressed, (R, C), dense)
    in_a_thread(lambda: bench.lt.multiply(compressed, (R, C), dense))
    first, second = bench.fake.launches
    assert first.workspace == second.workspace


def test_a_captured_product_takes_a_workspace_of_its_own(bench: Bench) -> None:
    compressed, dense = bench.lt.compress(sparse()), normal(C, N)
    bench.lt.multiply(compressed, (R, C), dense)
    bench.devices.capturing = True
    before = bench.fake.calls.copy()
    bench.lt.multiply(compressed, (R, C), dense)
    assert bench.fake.calls - before == {"matmul": 1}
    bench.devices.capturing = False
    bench.lt.multiply(compressed, (R, C), dense)
    first, captured, after = (launch.workspace for launch in bench.fake.launches)
    assert first == after != captured


def test_a_library_that_needs_no_workspace_gets_none() -> None:
    bench = Bench(workspace=0)
    a, dense = sparse(), normal(C, N)
    assert_close(bench.lt.multiply(bench.lt.compress(a), (R, C), dense), a.double() @ dense.double())
    assert bench.fake.launches[0].workspace == 0
