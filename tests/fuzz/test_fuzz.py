"""Some of the cases of `make fuzz`, the same ones each time; and that it notices what it looks for."""
import os
import sys
from pathlib import Path

import pytest

from t2t_timm.errors import UserError

pytestmark = pytest.mark.skipif(
    sys.platform != 'linux', reason='the worker limits its memory and reads its peak as Linux does: run it there')


@pytest.fixture(scope='module')
def fuzzed():
    """Outcomes and findings of seeded cases, and between them of one that there is not, which ends the process."""
    from fuzz.run import fuzz
    trees, checkpoints = [f'tree:{seed}' for seed in range(25)], [f'checkpoint:{seed}' for seed in range(70, 95)]
    return fuzz([*trees, 'nothing:1', *checkpoints])


def test_seeded_cases_and_a_process_that_dies(fuzzed):
    outcomes, findings = fuzzed
    assert findings.keys() == {'nothing:1'} and 'killed the process' in findings['nothing:1']
    assert outcomes.pop('nothing: killed') == 1
    assert outcomes.total() == 50 and len(outcomes) == 4, outcomes  # some succeed, some are refused


@pytest.mark.parametrize('harm, words', [
    (lambda folder: 1 / 0, 'ZeroDivisionError'),
    (lambda folder: os.system('true'), 'os.system'),
    (lambda folder: Path('/nowhere/x').mkdir(), 'os.mkdir'),
    (lambda folder: leave(folder), 'left behind'),
    (lambda folder: refuse(''), 'no message of one line'),
], ids=['exception', 'execution', 'outside', 'left', 'message'])
def test_what_is_looked_for_is_found(tmp_path, harm, words):
    from fuzz.worker import Watch, call
    watch = Watch()
    watch.folder = str(tmp_path)
    try:
        _, found = call(watch, tmp_path, harm, tmp_path)
    finally:
        watch.folder = None
    assert any(words in what for what in found), found


def refuse(message):
    raise UserError(message)


def leave(folder):
    (folder / 'x').write_text('x')
    refuse('A sentence.')
