"""Recall and dead heads of a model: means, table and warning."""

import numpy as np

from train.evaluation.heads import NOTE, UNDEFINED, HeadReport, mean_recall

REPORT = HeadReport(
    blocks=[0, 2],
    recall=[[0.5, 0.004], [-0.25, 0.0]],
    dead=[[False, False], [False, True]],
)


def test_mean_recall_omits_the_last_segment():
    recall = np.array([[[0.2, 1.0], [0.4, np.nan], [9.0, 9.0]], [[0.6, 1.0], [0.8, 1.0], [9, 9]]])
    mean, undefined = mean_recall(recall)
    np.testing.assert_allclose(mean, 0.5)
    assert undefined is None
    assert mean_recall(recall[:, :1]) == [None, None]


def test_table_marks_dead_heads():
    assert REPORT.rows == [
        {"block": "0", "head 0": "0.5", "head 1": "0.004"},
        {"block": "2", "head 0": "-0.25", "head 1": "0 dead"},
    ]


def test_undefined_recall_is_a_dash_with_a_note():
    report = HeadReport([1], [[0.5, None]], [[False, False]])
    assert report.rows == [{"block": "1", "head 0": "0.5", "head 1": "–"}]
    assert report.notes == [NOTE, UNDEFINED]
    assert UNDEFINED not in REPORT.notes


def test_warning_names_blocks_and_heads():
    assert REPORT.warning == (
        "warning: dead: block 2 head 1; recall below 0.01: block 0 head 1, block 2 head 0"
    )
    healthy = HeadReport([1], [[0.5, None]], [[False, False]])
    assert healthy.warning is None
