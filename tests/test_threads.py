"""Threads: how many a process gets, that they are released and shared fairly, and fork."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import _core

BIG = 1 << 20  # elements: 32 pieces, so that every thread gets some
PATIENCE = 60  # seconds; only a hang takes that long
VARIABLES = ("FUSEDSTEP_NUM_THREADS", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks"
)


def python(code, **variables):
    """Runs `code` in a new interpreter under these environment variables."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def threads_under(prelude="", **variables):
    done = python(
        f"import os\n{prelude}\nimport fusedstep\nprint(fusedstep.num_threads())", **variables
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# -- how many -------------------------------------------------------------------------------------


def test_num_threads_is_what_was_set():
    for n in (1, 2, 3, 4096, np.int64(5)):
        fs.set_num_threads(n)
        assert fs.num_threads() == n
        assert type(fs.num_threads()) is int


@pytest.mark.parametrize("n", [0, -1, 4097, 2**31, 2**40, -(2**70)])
def test_set_num_threads_out_of_range_is_refused(n):
    before = fs.num_threads()
    with pytest.raises(ValueError, match=f"n must be an integer from 1 to 4096, got {n}"):
        fs.set_num_threads(n)
    assert fs.num_threads() == before


@pytest.mark.parametrize("n", [1.0, "2", None, True, [2], np.float64(2)])
def test_set_num_threads_of_a_wrong_type_is_refused(n):
    before = fs.num_threads()
    with pytest.raises(TypeError, match="n must be an integer, got"):
        fs.set_num_threads(n)
    assert fs.num_threads() == before


def test_environment_sets_the_number():
    assert threads_under(FUSEDSTEP_NUM_THREADS="7") == 7
    # A launcher's division is of the default, not of what was asked for.
    assert threads_under(FUSEDSTEP_NUM_THREADS="6", LOCAL_WORLD_SIZE="2") == 6


def test_environment_empty_means_the_default():
    assert threads_under(FUSEDSTEP_NUM_THREADS="") == threads_under()


@pytest.mark.parametrize(
    "text", ["0", "-1", "4097", "two", "2.0", "2 threads", "99999999999999999999"]
)
def test_environment_invalid_is_a_value_error_at_import(text):
    done = python("import fusedstep", FUSEDSTEP_NUM_THREADS=text)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ValueError: FUSEDSTEP_NUM_THREADS must be an integer from 1 to 4096, got '{text}'"
    )


def test_omp_num_threads_has_no_effect():
    # Launchers set it to 1 for torch's sake.
    assert (
        threads_under(OMP_NUM_THREADS="1") == threads_under() == threads_under(OMP_NUM_THREADS="9")
    )


@needs_affinity
def test_default_is_the_affinity_mask_within_the_quota():
    cpus = sorted(os.sched_getaffinity(0))
    everything = threads_under()
    assert 1 <= everything <= len(cpus)
    one = f"os.sched_setaffinity(0, {{{cpus[-1]}}})"
    assert threads_under(one) == 1
    if everything > 1:
        assert everything > threads_under(one)


def test_local_world_size_divides_the_default():
    everything = threads_under()
    for processes in (1, 2, 3, 1000):
        share = threads_under(LOCAL_WORLD_SIZE=str(processes))
        assert share == max(1, everything // processes)


@pytest.mark.parametrize(("n", "most"), [(1000, 1), (BIG, 2)])
def test_core_tells_how_many_threads_a_step_used(n, most):
    fs.set_num_threads(2)
    opt, grads = fs.SGD(np.zeros(n, np.float32)), np.ones(n, np.float32)
    _core.take_threads_used()
    used = []
    for _ in range(200):
        opt.step(grads)
        used.append(_core.take_threads_used())
    assert _core.take_threads_used() == 0
    assert max(used) == most


def test_default_threads_is_what_a_new_process_gets():
    assert threads_under() == int(
        python("import fusedstep._core as c; print(c.default_threads())").stdout
    )


# -- cgroup quotas, on trees of our own -----------------------------------------------------------


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({}, "0::/\n", 0),
        ({}, "", 0),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", 0),
        ({"a/cpu.max": "50000 100000\n"}, "0::/a\n", 0.5),
        ({"a/cpu.max": "50000 100000\n"}, "0::/b\n", 0),
        ({"a/b/cpu.max": "400000 100000\n"}, "0::/a/b\n", 4),
        # A parent that is tighter binds its children; one that is looser does not.
        ({"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "200000 100000\n"}, "0::/a/b\n", 2),
        ({"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "200000 100000\n"}, "0::/a/b\n", 1),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "30000 10000\n"}, "0::/a/b\n", 3),
        ({"a/b/cpu.max": "max 100000\n", "cpu.max": "70000 10000\n"}, "0::/a/b/c\n", 7),
        ({"a/cpu.max": "nonsense\n"}, "0::/a\n", 0),
    ],
)
def test_cpu_quota_of_cgroup_v2(tmp_path, files, membership, quota):
    for name, text in files.items():
        write(tmp_path / name, text)
    assert _core.cpu_quota(membership, str(tmp_path)) == quota


@pytest.mark.parametrize(
    ("quotas", "path", "quota"),
    [
        ({"": (150000, 100000)}, "/", 1.5),
        ({"": (-1, 100000)}, "/", 0),
        ({"/docker/x": (200000, 100000)}, "/docker/x", 2),
        ({"/docker/x": (-1, 100000), "/docker": (300000, 100000)}, "/docker/x", 3),
        ({"/docker/x": (400000, 100000), "/docker": (50000, 100000)}, "/docker/x", 0.5),
        ({"/docker/x": (400000, 100000), "": (-1, 100000)}, "/docker/x", 4),
        ({"/other": (50000, 100000)}, "/docker/x", 0),
    ],
)
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_cpu_quota_of_cgroup_v1(tmp_path, quotas, path, quota, controllers):
    for group, (used, period) in quotas.items():
        write(tmp_path / f"cpu{group}/cpu.cfs_quota_us", f"{used}\n")
        write(tmp_path / f"cpu{group}/cpu.cfs_period_us", f"{period}\n")
    # cpuset has a name that begins alike, and comes with other paths.
    lines = f"12:cpuset:/elsewhere\n4:{controllers}:{path}\n1:name=systemd:/init\n"
    assert _core.cpu_quota(lines, str(tmp_path)) == quota


def test_cpu_quota_of_both_versions_takes_the_tighter(tmp_path):
    write(tmp_path / "cpu/a/cpu.cfs_quota_us", "400000")
    write(tmp_path / "cpu/a/cpu.cfs_period_us", "100000")
    write(tmp_path / "b/cpu.max", "300000 100000")
    assert _core.cpu_quota("4:cpu:/a\n0::/b\n", str(tmp_path)) == 3


def test_cpu_quota_survives_a_malformed_membership(tmp_path):
    for text in ("nonsense", "0:", "0::", "0::relative", ":::", "0::/\n\n:\n"):
        assert _core.cpu_quota(text, str(tmp_path)) == 0


# -- fork -----------------------------------------------------------------------------------------


def big_step():
    """One step that uses the pool; its result is 0.5 everywhere."""
    param = np.ones(BIG, np.float32)
    opt = fs.SGD(param, lr=0.5)
    opt.step(np.ones(BIG, np.float32))
    return param


def step_and_exit():
    """In a child: exit status 0 when a step gives the right result."""
    os._exit(0 if (big_step() == 0.5).all() else 3)


def fork(child):
    """Forks; the child's process id."""
    with warnings.catch_warnings():
        # Python 3.12 warns that other threads exist; that they do is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(4)  # whatever happened, pytest must not run on in the child
    return pid


def status_of(pid):
    """A child's exit status, or a failure when it hangs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hangs")


@needs_fork
def test_fork_child_steps_after_the_pool_has_run():
    fs.set_num_threads(4)
    assert (big_step() == 0.5).all()
    children = [fork(step_and_exit) for _ in range(3)]
    assert (big_step() == 0.5).all()  # and the parent goes on
    assert [status_of(pid) for pid in children] == [0, 0, 0]


@needs_fork
def test_fork_grandchild_steps_too():
    fs.set_num_threads(2)
    big_step()

    def child():
        assert (big_step() == 0.5).all()
        os._exit(status_of(fork(step_and_exit)))

    assert status_of(fork(child)) == 0


@needs_fork
def test_fork_child_goes_on_with_the_parent_s_optimizer():
    fs.set_num_threads(2)
    param, grad = np.ones(BIG, np.float32), np.ones(BIG, np.float32)
    opt = fs.SGD(param, lr=0.5)
    opt.step(grad)

    def child():
        opt.step(grad)
        os._exit(0 if not param.any() and opt.steps == 2 else 3)

    assert status_of(fork(child)) == 0
    assert (param == 0.5).all()
    assert opt.steps == 1


@contextlib.contextmanager
def stepping_in_another_thread(opt, grad):
    """Another thread steps `opt` over and over; at least once before the block begins."""
    stop, begun, failed = threading.Event(), threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                opt.step(grad)
                begun.set()
        except BaseException as error:
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(PATIENCE)
        yield
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not failed


def test_loading_while_another_thread_steps_raises_and_loses_nothing():
    # Each step subtracts 1 from every element: a load that replaced what a running step writes to
    # would leave elements behind, and one that loses its count would too.
    w = np.zeros(1 << 21, np.float32)
    opt = fs.SGD([w], lr=1.0)
    grad = [np.ones_like(w)]
    refused = []
    give_up = time.monotonic() + PATIENCE
    with stepping_in_another_thread(opt, grad):
        while len(refused) < 20 and time.monotonic() < give_up:
            try:
                opt.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
                opt.state_dict()
            except RuntimeError as error:
                refused.append(str(error))
            time.sleep(1e-4)  # lets the other thread begin its next step
    assert set(refused) == {"this optimizer is already stepping in another thread"}
    assert np.unique(w).size == 1


@needs_fork
def test_fork_child_steps_an_optimizer_whose_step_the_fork_interrupted():
    w = np.zeros(1 << 21, np.float32)
    opt = fs.SGD([w], lr=1.0)
    grad = [np.ones_like(w)]

    def child():
        opt.step(grad)
        os._exit(0)

    with stepping_in_another_thread(opt, grad):
        statuses = [status_of(fork(child)) for _ in range(10)]
    assert statuses == [0] * 10


@needs_fork
def test_fork_while_another_thread_steps():
    # The child has neither the stepping thread nor the workers, and the pool was busy at the fork.
    fs.set_num_threads(2)
    param, grad = np.zeros(1 << 22, np.float32), np.ones(1 << 22, np.float32)
    with stepping_in_another_thread(fs.SGD(param), grad):
        statuses = []
        for _ in range(8):
            statuses.append(status_of(fork(step_and_exit)))
            time.sleep(0.003)
    assert statuses == [0] * 8


def step_in_pool(seed):
    param = np.full(BIG, seed, np.float32)
    fs.SGD(param, lr=1.0).step(np.ones(BIG, np.float32))
    return float(param.min()), float(param.max())


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # as in fork()
def test_fork_by_multiprocessing():
    fs.set_num_threads(2)
    big_step()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(step_in_pool, range(4)).get(PATIENCE)
        pool.terminate()
        pool.join()
    assert results == [(s - 1.0, s - 1.0) for s in range(4)]


# -- several Python threads -----------------------------------------------------------------------


def in_threads(*works):
    """Runs the functions at once, each in a thread; raises what any of them raised."""
    failed = []
    gate = threading.Barrier(len(works))

    def run(work):
        try:
            gate.wait(PATIENCE)
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a step hangs"
    for error in failed:
        raise error


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_two_optimizers_in_two_threads_give_the_bits_of_serial(threads):
    fs.set_num_threads(threads)
    rng = np.random.default_rng(0)
    start = rng.standard_normal(BIG + 17, np.float32)
    grads = rng.standard_normal((2, BIG + 17), np.float32)

    def made(k):
        param = start.copy()
        return param, (fs.Adam if k else fs.RMSprop)(param, lr=0.1)

    def steps(opt, k):
        for _ in range(10):
            opt.step(grads[k])

    serial, parallel = [made(k) for k in (0, 1)], [made(k) for k in (0, 1)]
    for k, (_, opt) in enumerate(serial):
        steps(opt, k)
    in_threads(*[lambda k=k, opt=opt: steps(opt, k) for k, (_, opt) in enumerate(parallel)])
    for (expected, _), (found, opt) in zip(serial, parallel, strict=True):
        assert found.tobytes() == expected.tobytes()
        assert opt.steps == 10


@pytest.fixture
def eager_switches():
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize(("tensors", "n", "rounds"), [(1, 1 << 22, 60), (4000, 16, 200)])
def test_one_optimizer_in_two_threads_is_refused_or_serial(tensors, n, rounds):
    # Every step that returns has happened once and whole, none has mixed its gradients with those
    # of the other thread, and every other step says so. The many small tensors make the time long
    # in which a step reads its table, the large one the time in which it sweeps.
    fs.set_num_threads(2)
    params = [np.zeros(n, np.float32) for _ in range(tensors)]
    opt = fs.SGD(params, lr=1.0)
    done = [0, 0]

    def steps(k):
        grads = [np.full(n, -(1 + 1000 * k), np.float32) for _ in range(tensors)]
        for i in range(rounds):
            # The second thread makes its arrays anew: they must live as long as they are read.
            mine = [g.copy() for g in grads] if k and tensors > 1 and i % 8 == 0 else grads
            try:
                opt.step(mine)
                done[k] += 1
            except RuntimeError as error:
                assert "another thread" in str(error)  # noqa: PT017

    in_threads(lambda: steps(0), lambda: steps(1))
    assert sum(done) > 0
    assert opt.steps == sum(done)
    expected = done[0] + 1001 * done[1]
    assert {float(p.min()) for p in params} == {float(p.max()) for p in params} == {expected}
    opt.step([np.ones(n, np.float32) for _ in range(tensors)])  # it is not stuck


def test_step_inside_a_thread_after_the_main_thread_stepped():
    fs.set_num_threads(2)
    big_step()
    results = []
    in_threads(lambda: results.append(big_step()))
    assert (results[0] == 0.5).all()


def test_gil_is_released_during_a_large_step():
    # One thread for the step leaves a core to the other Python thread; only ticks from well inside
    # the call count, as the GIL is free for a moment before and after it anyway.
    fs.set_isa("scalar")
    fs.set_num_threads(1)
    n = 1 << 22
    opt = fs.Adam(np.ones(n, np.float32))
    grad = np.ones(n, np.float32)
    opt.step(grad)
    stop, ticks = threading.Event(), []

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        inside = 0
        for _ in range(20):  # a loaded machine may starve the thread for a while
            begin = time.perf_counter()
            opt.step(grad)
            end = time.perf_counter()
            margin = (end - begin) / 4
            inside += sum(begin + margin < t < end - margin for t in ticks)
            if inside >= 3:
                break
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert inside >= 3


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_thread_count_does_not_change_a_bit(threads):
    rng = np.random.default_rng(1)
    shapes = [(BIG + 5,), (7,), (0,), (100_003,), (1,)]
    start = [rng.standard_normal(s, np.float32) for s in shapes]
    grads = [rng.standard_normal(s, np.float32) for s in shapes]
    results = []
    for count in (1, threads):
        fs.set_num_threads(count)
        params = [a.copy() for a in start]
        opt = fs.AdamW(params, lr=0.1)
        for _ in range(3):
            opt.step(grads)
        results.append(b"".join(a.tobytes() for a in params))
    assert results[0] == results[1]


def test_step_uses_several_threads():
    # Without this every other test here would pass on a pool that never starts.
    if sys.platform != "linux":
        pytest.skip("no /proc/self/task: not Linux")
    code = """
import os, numpy as np, fusedstep as fs
before = len(os.listdir("/proc/self/task"))
fs.set_num_threads(5)
opt = fs.SGD(np.ones(1000, np.float32)); opt.step(np.ones(1000, np.float32))
small = len(os.listdir("/proc/self/task"))
opt = fs.SGD(np.ones(1 << 20, np.float32)); opt.step(np.ones(1 << 20, np.float32))
print(small - before, len(os.listdir("/proc/self/task")) - before)
"""
    done = python(code)
    assert done.stdout.split() == ["0", "4"], done.stderr  # small work stays on the caller
