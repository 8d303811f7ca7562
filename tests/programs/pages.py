"""The commands of docs/, run as they are written there, with timm's programs from a checkout."""
import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parents[2] / 'docs'


class Page:
    """The shell blocks of a page of docs/; the first defines what the others use, and all run in `folder`."""

    def __init__(self, name: str, folder: Path, **env: str) -> None:
        self.text = (DOCS / name).read_text(encoding='utf-8')
        self.blocks = re.findall(r'^```sh\n(.*?)^```$', self.text, re.MULTILINE | re.DOTALL)
        self.folder = folder
        self.env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
        self.env.update(env)

    def commands(self) -> list[str]:
        """Return the commands of one line, continued lines joined, of all blocks but the first."""
        return [c for block in self.blocks[1:] for c in block.replace('\\\n', '').splitlines()]

    def command(self, words: str) -> str:
        """Return the only command that has these words at its end or before a space."""
        found = [c for c in self.commands() if f'{words} ' in f'{c} ']
        assert len(found) == 1, (words, found)
        return found[0]

    def start(self, command: str) -> subprocess.Popen:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            ['sh', '-ec', f'{self.blocks[0]}\n{command}'], cwd=self.folder, env=self.env, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, command: str, fails: bool = False) -> str:
        """Run a command to its end and return what it printed; it should succeed, or fail."""
        process = self.start(command)
        out, _ = process.communicate()
        assert (process.returncode != 0) == fails, f'{command}\n{out}'
        return out


def top1(out: str) -> float:
    """Return the top-1 that train.py, validate.py or onnx_validate.py ended with."""
    found = re.findall(r'Acc@1: +[\d.]+ \( *([\d.]+)\)|\* (?:Acc|Prec)@1 ([\d.]+)', out)
    return float(''.join(found[-1]))


def stated(command: str) -> float:
    """Return the figure that the page states behind a command."""
    return float(command.rpartition('#')[2])


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint of train.py."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True)
