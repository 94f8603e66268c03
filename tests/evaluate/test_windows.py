"""The windows cover a row as the protocols say, whatever the sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from milo.evaluate.windows import cut, in_batches

rows = st.tuples(st.integers(2, 300), st.integers(2, 80)).flatmap(
    lambda row: st.tuples(st.just(row[0]), st.just(row[1]), st.integers(1, row[1]))
)


@given(rows)
def test_every_token_is_scored_at_most_once_and_only_window_heads_are_left_out(row):
    length, window, stride = row
    windows = cut(length, window, stride)
    scored = [t for w in windows for t in range(w.end - w.scored, w.end)]
    assert scored == sorted(set(scored))
    heads = set(range(0, length, window)) if stride == window else {0}
    assert set(range(length)) - set(scored) == heads


@given(rows)
def test_windows_are_whole_but_for_the_last_and_never_predict_their_first_token(row):
    length, window, stride = row
    *whole, last = cut(length, window, stride)
    assert all(w.end - w.begin == window for w in whole)
    assert all(1 <= w.scored < w.end - w.begin for w in [*whole, last])
    assert last.end <= length


@given(rows, st.integers(1, 9))
def test_batches_keep_the_order_and_hold_one_length(row, batch):
    windows = cut(*row)
    runs = list(in_batches(windows, batch))
    assert [w for run in runs for w in run] == windows
    assert all(len(run) <= batch and len({w.end - w.begin for w in run}) == 1 for run in runs)
