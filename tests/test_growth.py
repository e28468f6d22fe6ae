"""What grows with the number of parameters or groups grows no faster: by counts, not by a clock."""

import random
import sys

import numpy as np
import pytest

import fusedstep as fs
from fusedstep._groups import Patterns
from optional import optional

torch = optional("torch")
ft = optional("fusedstep.torch")


def calls(run):
    """How many functions were called, Python's and C's."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


class Counted(list):
    """A list that counts the elements read from it."""

    read = 0

    def __iter__(self):
        for item in super().__iter__():
            Counted.read += 1
            yield item

    def __getitem__(self, key):
        Counted.read += 1
        return super().__getitem__(key)


def cost(run):
    Counted.read = 0
    return calls(run) + Counted.read


PATTERNS = {
    "names": lambda i: [f"layer.{i}.w", f"layer.{i}.b"],
    "ends": lambda i: f"layer.{i}.*",
    "begins": lambda i: [f"*.{i}.w", f"*.{i}.b"],
    "middles": lambda i: f"*er.{i}.[wb]",
    "several": lambda i: f"layer*.{i}.?",
}


def check_linear(make):
    """`make(n)` gives what is to be run for n: its cost for 4n is 4 times that for n."""
    make(5)()  # what is made once
    small, large = cost(make(50)), cost(make(200))
    assert large <= 4.1 * small


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_constructor_is_linear_in_groups(pattern):
    def make(n):
        names = [f"layer.{i:04}.{kind}" for i in range(n) for kind in "wb"]
        params = {name: np.zeros(2, np.float32) for name in names}
        groups = [fs.Group(pattern(f"{i:04}"), lr=0.1) for i in range(n)]
        return lambda: fs.Adam(params, groups=groups)

    check_linear(make)


def test_the_first_group_that_matches_is_found():
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab*?[]!-", k=draw.randrange(6))) for _ in range(300)]
    names = ["".join(draw.choices("ab*[]", k=draw.randrange(5))) for _ in range(300)]
    for _ in range(40):
        groups = [fs.Group(draw.sample(texts, draw.randint(1, 2))) for _ in range(8)]
        patterns = Patterns(groups)
        for name in names:
            expected = next((k for k, group in enumerate(groups) if group.matches(name)), None)
            assert patterns.first(name) == expected, (name, groups)


def test_a_constructor_of_torch_is_linear_in_groups():
    def make(n):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(n)]
        return lambda: ft.Adam(groups)

    check_linear(make)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_in_backward_are_linear_in_parameters(grouped, strided):
    def make(n):
        tensors = [torch.ones(2, 2) for _ in range(n)]
        if strided:
            tensors = [tensor.repeat(1, 2)[:, ::2] for tensor in tensors]
        model = torch.nn.ParameterList(map(torch.nn.Parameter, tensors))
        params = list(model)
        opt = ft.Adam([{"params": [p]} for p in params] if grouped else params)
        for group in opt.param_groups:
            group["params"] = Counted(group["params"])
        opt.param_groups = Counted(opt.param_groups)
        ft.step_in_backward(model, opt)
        losses = [sum(p.sum() for p in params) for _ in range(2)]
        losses[0].backward()
        return losses[1].backward

    check_linear(make)


def test_load_state_dict_is_linear_in_parameters():
    def make(n):
        opt = fs.Adam([np.zeros(2, np.float32) for _ in range(n)])
        opt.step([np.ones(2, np.float32) for _ in range(n)])
        saved = opt.state_dict()
        return lambda: opt.load_state_dict(saved)

    check_linear(make)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_load_state_dict_of_torch_is_linear_in_parameters(grouped, capturable):
    def make(n):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(n)]
        opt = ft.Adam([{"params": [p]} for p in params] if grouped else params)
        for param in params:
            param.grad = torch.ones(2)
        opt.step()
        saved = opt.state_dict()
        for group in opt.param_groups:  # as after a move from a GPU
            group["capturable"] = capturable
        return lambda: opt.load_state_dict(saved)

    check_linear(make)
