"""Some of the cases of `make fuzz`, the same ones each time; and that it notices what it looks for."""
import os
import sys
from pathlib import Path

import pytest

from t2t_timm.errors import UserError

pytestmark = pytest.mark.skipif(
    sys.platform != 'linux', reason='a case limits its memory and reads its peak as Linux does: run it there')


def test_seeded_cases():
    from fuzz.run import fuzz
    outcomes, findings = fuzz([f'tree:{seed}' for seed in range(25)] + [f'checkpoint:{seed}' for seed in range(70, 95)])
    assert not findings
    assert outcomes.total() == 50 and len(outcomes) == 4, outcomes  # some succeed, some are refused


def refuse(folder, message):
    (folder / 'x').write_text('x')
    raise UserError(message)


@pytest.mark.parametrize('harm, words', [
    (lambda folder: 1 / 0, 'ZeroDivisionError'),
    (lambda folder: os.system('true'), 'os.system'),
    (lambda folder: Path('/nowhere/x').mkdir(), 'os.mkdir'),
    (lambda folder: refuse(folder, 'A sentence.'), 'left behind'),
    (lambda folder: refuse(folder, ''), 'no message of one line'),
    (lambda folder: os._exit(3), 'killed the process, exit code 3'),
], ids=['exception', 'execution', 'outside', 'left', 'message', 'end'])
def test_what_is_looked_for_is_found(monkeypatch, harm, words):
    from fuzz.run import CASES, fuzz
    monkeypatch.setitem(CASES, 'harm', lambda rng, folder: [(harm, folder)])
    assert words in fuzz(['harm:1'])[1]['harm:1']
