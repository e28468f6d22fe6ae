"""DeepSpeed's folders: ranks joined; what is missing, of another kind or not plain is refused."""

import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.__main__ import main
from fusedstep.convert import deepspeed
from fusedstep.convert import torch as files
from optional import optional

torch = optional("torch")
FOLDER = pathlib.Path(__file__).parent / "golden" / "checkpoints" / "deepspeed"
SHAPES = {"w": (2, 3), "b": (4,)}
PARTITION = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A recorded folder to spoil, and what writes a file of it with another content."""

    def copy(name):
        return pathlib.Path(shutil.copytree(FOLDER / name, tmp_path / name)) / "step"

    def change(path, how):
        found = files.read(path, deepspeed._STAND_INS)
        how(found)
        for kind in deepspeed._STAND_INS:  # a pickle names classes that can be imported
            for part in ("deepspeed", kind.__module__):
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        for kind in deepspeed._STAND_INS:
            setattr(sys.modules[kind.__module__], kind.__name__, kind)
        torch.save(found, path)

    copy.change = change
    return copy


@pytest.mark.parametrize("name", ["zero1of3", "zero2of2", "zero2of3"])
def test_pieces_of_all_ranks_are_one_array(name):
    state = fs.convert.from_deepspeed(FOLDER / name, SHAPES, "AdamW" if name[4] == "2" else None)
    assert {name: one.shape for name, one in state.masters.items()} == SHAPES
    parts = [
        files.read(path, deepspeed._STAND_INS)["optimizer_state_dict"]
        for path in sorted((FOLDER / name / "step").glob("*zero_pp*"))
    ]
    for g, own in enumerate(state["param_groups"]):
        # Without its end, padding, a group is its ranks' partitions one after another.
        held = np.concatenate(
            [part["single_partition_of_fp32_groups"][g].detach() for part in parts]
        )
        joined = [state.masters[name].ravel() for name in own["param_names"]]
        assert np.array_equal(np.concatenate(joined), held[: sum(map(len, joined))])
        for key in state["state"][0].keys() - {"step"}:
            held = [part["base_optimizer_state"]["state"][g][key] for part in parts]
            joined = np.concatenate([state["state"][i][key].ravel() for i in own["params"]])
            assert np.array_equal(joined, np.concatenate(held)[: len(joined)])


def test_parameters_dealt_to_ranks_are_told_apart():
    # Pieces have wrong names there, see findings/dealt_parameters_mixed.sh.
    state = fs.convert.from_deepspeed(FOLDER / "dealt2of2")
    (group,) = state["param_groups"]
    assert group["param_names"] == ["p1", "p2", "p3", "p4", "p5"]
    for i, name in enumerate(group["param_names"]):
        n = i + 1
        assert np.allclose(state["state"][i]["exp_avg"], np.full(n, 0.1 * n))
        assert np.allclose(state.masters[name], np.full(n, n), rtol=0.02)


def test_parameters_are_told_by_name_or_in_the_groups_order():
    unnamed = fs.convert.from_deepspeed(FOLDER / "zero1of3", list(SHAPES.values()))
    turned = fs.convert.from_deepspeed(FOLDER / "zero1of3", {"b": (4,), "w": (2, 3)})
    for state in (unnamed, turned):
        assert state["param_groups"][0]["param_names"] == ["w", "b"]
        assert state["state"][0]["sum"].shape == (2, 3)


def test_latest_is_the_one_unless_another_is_named(copied):
    path = copied("zero1of3")
    for folder, tag in ((path.parent, None), (path, None), (path.parent, "step")):
        assert fs.convert.from_deepspeed(folder, tag=tag).step == 10
    with pytest.raises(FileNotFoundError, match="none"):
        fs.convert.from_deepspeed(path.parent, tag="none")


def test_configuration_says_what_adam_it_made():
    assert fs.convert.from_deepspeed(FOLDER / "zero2of2").optimizer == "Adam"  # adam_w_mode=False
    with pytest.raises(ValueError, match=r"weight_decay=0.1 is Adam's or AdamW's"):
        fs.convert.from_deepspeed(FOLDER / "zero2of3")  # the client made it
    assert fs.convert.from_deepspeed(FOLDER / "zero2of3", None, "AdamW").at_step == {
        "max_norm": 0.5
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": (2, 3)}, r"params must be those of step, got missing \['b'\], unknown \[\]"),
        ({**SHAPES, "v": (1,)}, r"got missing \[\], unknown \['v'\]"),
        ({"w": (3, 2), "b": (4,)}, r"param_shapes of 'w' must have shape \(3, 2\), got \(2, 3\)"),
        ([(2, 3)], "must have param_shapes of 1 parameters, got 2"),
    ],
)
def test_other_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        fs.convert.from_deepspeed(FOLDER / "zero1of3", params)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def rename(name):
    return lambda path: path.rename(path.with_name(name))


FILES = [
    ("mp_rank_00_model_states.pt", pathlib.Path.unlink, r"step must have mp_rank_00_model_states"),
    ("mp_rank_00_model_states.pt", truncate, "model_states.pt must be a whole file of tensors"),
    (PARTITION.format(1), truncate, "rank_1_mp_rank_00_optim_states.pt must be a whole file"),
    (PARTITION.format(1), pathlib.Path.unlink, r"partition_count \[3\], got ranks \[0, 2\]"),
    (PARTITION.format(2), pathlib.Path.unlink, r"partition_count \[3\], got ranks \[0, 1\]"),
    (
        PARTITION.format(2),
        lambda path: shutil.copy(path, path.with_name(f"bf16_{path.name}")),
        "rank 2 must have one file, got bf16_zero_pp_rank_2",
    ),
    (
        PARTITION.format(1),
        lambda path: shutil.copy(path.with_name(PARTITION.format(2)), path),
        "step must have 6 elements of 'w' on all ranks, got 4",
    ),
    (
        PARTITION.format(2),
        lambda path: shutil.copy(path.with_name(PARTITION.format(1)), path),
        "step must have 6 elements of 'w' on all ranks, got 8",
    ),
    (
        PARTITION.format(1),
        rename("zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        "ZeRO 1 and 2 alone are read, not model parallelism",
    ),
    (
        "mp_rank_00_model_states.pt",
        rename("zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "not ZeRO stage 3",
    ),
    (
        PARTITION.format(1),
        rename("layer_0_expert_0_mp_rank_00_model_states.pt"),
        "not mixtures of experts",
    ),
]


@pytest.mark.parametrize(("file", "spoil", "message"), FILES)
def test_folder_that_is_not_whole_is_refused(file, spoil, message, copied):
    path = copied("zero1of3")
    spoil(path / file)
    with pytest.raises(ValueError, match=message):
        fs.convert.from_deepspeed(path)


class Harmless:
    """Something that a pickle may name and no converter makes."""

    made = 0

    def __new__(cls):
        cls.made += 1
        return object.__new__(cls)

    def __reduce__(self):
        return Harmless, ()


def put(*path, value):
    """What puts a value into nested dicts and lists."""

    def change(found):
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


STATE = ("optimizer_state_dict", "base_optimizer_state", "state", 0)
CONTENTS = [
    (put("ds_config", value=Harmless()), r"optim_states.pt must be .* names test_\w+.Harmless$"),
    (put("ds_config", value=shutil.rmtree), "names shutil.rmtree"),
    (put(*STATE, "step", value=9.0), r"step of .* must be 10.0, as on other ranks, got 9.0"),
    (put(*STATE, "sum", value=torch.ones(3)), r"flat, of 4 elements or more, got shape \(3,\)"),
    (put(*STATE, "absmax1", value=0.5), "must have step, sum of Adagrad, got 'absmax1'"),
    (put(*STATE[:3], value={}), r"must have 10 elements of sum of .* on all ranks, got 6"),
    (put(*STATE[:2], value=[{}]), "must have 'base_optimizer_state', a dict, got list"),
    (put("optimizer_state_dict", "partition_count", value=[2]), "of each rank of partition_count"),
    (put("optimizer_state_dict", value={}), r"must have 'partition_count', a \w+, got \[\]"),
    (
        put("optimizer_state_dict", "param_slice_mappings", value=[{"v": None}]),
        "must have a place of 'v', got None, None",
    ),
    (
        put("optimizer_state_dict", "single_partition_of_fp32_groups", value=[]),
        r"must have 1 groups, got \[0, 1, 1\]",
    ),
]


@pytest.mark.parametrize(("how", "message"), CONTENTS)
def test_file_with_something_else_is_refused(how, message, copied):
    path = copied("zero1of3")
    copied.change(path / PARTITION.format(1), how)
    made = Harmless.made
    with pytest.raises(ValueError, match=message):
        fs.convert.from_deepspeed(path, SHAPES)
    assert Harmless.made == made


def test_model_file_with_something_else_is_refused(copied):
    path = copied("zero0of1")
    copied.change(path / "mp_rank_00_model_states.pt", put("client", value=Harmless()))
    with pytest.raises(ValueError, match=r"model_states.pt must be a whole .* names"):
        fs.convert.from_deepspeed(path)


def test_torch_must_know_of_stand_ins(monkeypatch):
    monkeypatch.delattr(torch.serialization, "safe_globals")
    with pytest.raises(ModuleNotFoundError, match=r"model_states.pt needs torch 2.5, got 2"):
        fs.convert.from_deepspeed(FOLDER / "zero0of1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "it without an optimizer"),
        ({"optimizer_state_dict": {}, "fp32_groups_flat": []}, r"\['fp32_groups_flat', 'opt"),
    ],
)
def test_flat_optimizer_without_zero_is_refused(value, message, copied):
    path = copied("zero0of1")
    copied.change(path / "mp_rank_00_model_states.pt", put("optimizer", value=value))
    with pytest.raises(ValueError, match=f"an optimizer that is not flat, got .*{message}"):
        fs.convert.from_deepspeed(path)


def test_command_takes_a_folder(capsys, tmp_path):
    import fusedstep.torch

    written = tmp_path / "optimizer.pt"
    words = ["convert", str(FOLDER / "zero2of3"), "--optimizer", "AdamW", "-o", str(written)]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    for told in (
        "checkpoint zero2of3, of deepspeed",
        "tensors 4 of 2 parameters, 80 bytes: exp_avg, exp_avg_sq",
        "each step max_norm=0.5",
        "masters 2 parameters in float32",
    ):
        assert told in said
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES.values()]
    for library in (torch.optim, fusedstep.torch):
        opt = library.AdamW([{"params": [p]} for p in params])
        opt.load_state_dict(torch.load(written, weights_only=True))
        assert opt.state[params[0]]["step"] == 10
