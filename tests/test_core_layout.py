"""Layouts and the constraint of fixed-length sequences."""

import numpy as np
import pytest

from actok.core import ConfigError, FixedLengthConstraint, TokenError, TokenLayout


def mixed() -> TokenLayout:
    return TokenLayout.uniform(np.array([3, 5, 2]), np.zeros((3, 3)), block=2)


def test_ragged_last_block_and_bits():
    layout = mixed()
    assert layout.blocks == ((0, 1), (2,))
    assert layout.passes == 2
    assert layout.bits == pytest.approx(np.log2(30))
    assert layout.fixed_length == 3


def test_variable_layout_has_no_fixed_length():
    layout = TokenLayout.variable(7, 2, 5)
    assert layout.fixed_length is None
    assert not layout.total


@pytest.mark.parametrize("blocks", [((0, 1),), ((1, 0), (2,)), ((0, 1), (1, 2)), ((0, 0), (1, 2))])
def test_blocks_must_list_every_position_once_in_order(blocks):
    with pytest.raises(ConfigError, match="blocks"):
        TokenLayout(
            vocab=[2] * 3, table=[0] * 3, coords=np.zeros((3, 3)), blocks=blocks, min_len=3, max_len=3, total=True
        )


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(ConfigError, match="same N"):
        TokenLayout(
            vocab=[2] * 3, table=[0] * 2, coords=np.zeros((3, 3)), blocks=((0, 1, 2),), min_len=3, max_len=3, total=True
        )


def test_constraint_reaches_every_sequence_and_nothing_else():
    constraint = FixedLengthConstraint(mixed())
    found = []

    def walk(state, prefix):
        if constraint.done(state)[0]:
            found.append(prefix)
            assert not constraint.allowed(state).any()
            return
        for token in np.flatnonzero(constraint.allowed(state)[0]):
            walk(constraint.advance(state, np.array([token])), [*prefix, int(token)])

    walk(constraint.start(), [])
    assert found == [[a, b, c] for a in range(3) for b in range(5) for c in range(2)]


def test_constraint_refuses_a_token_that_is_not_allowed():
    constraint = FixedLengthConstraint(mixed())
    with pytest.raises(TokenError, match="token 3 of sequence 1"):
        constraint.advance(constraint.start(2), np.array([0, 3]))
