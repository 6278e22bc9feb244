"""Random sizes, layouts, dtypes and options against the oracle."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cases import AFFINE, DTYPES, LAYOUTS, Case
from support import check_backward, check_forward, make_problem


@st.composite
def cases(draw):
    channels = draw(st.integers(1, 70))
    spatial = draw(st.lists(st.integers(1, 40), max_size=3))
    batch = draw(st.integers(1, 40))
    size = (batch, channels, *spatial)
    assume(torch.Size(size).numel() <= 200_000)
    return Case(
        size,
        draw(st.sampled_from(list(LAYOUTS))),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(list(AFFINE))),
        track=draw(st.booleans()),
        momentum=draw(st.sampled_from([None, 0.0, 0.1, 1.0])),
        param_dtype=draw(st.sampled_from([None, torch.float32])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
    )


@settings(deadline=None, max_examples=150, print_blob=True)
@given(case=cases(), seed=st.integers(0, 2**16), training=st.booleans())
def test_any_case(case, seed, training, device):
    assume(case.trainable if training else case.track)
    problem = make_problem(case, device, seed)
    _, stats = check_forward(problem.clone(), training)
    check_backward(problem, training, stats)
