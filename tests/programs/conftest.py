"""Fixtures: docs/programs.md, and its runs of train.py."""
import argparse
from typing import Any, Callable

import published
import pytest
import timm
import torch
from pages import Page, load


@pytest.fixture(scope='session')
def open_page(timm_scripts, tmp_path_factory) -> Callable[..., Page]:
    """A function that opens a page of docs/ in a folder of its own."""
    return lambda name, **env: Page(name, tmp_path_factory.mktemp('page'), **env)


@pytest.fixture(scope='session')
def page(open_page) -> Page:
    """docs/programs.md, its images made, and the embedded weights as the authors release theirs and fine-tuned ones."""
    page = open_page('programs.md')
    page.run(page.blocks[1])
    state = published.official(timm.create_model('test_t2t_vit', pretrained=True).state_dict())
    state = {f'module.{k}': v for k, v in state.items()}
    torch.save({
        'epoch': 309,
        'arch': 't2t_vit',
        'state_dict': {k: torch.zeros_like(v) for k, v in state.items()},
        'state_dict_ema': state,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.999)}]},
        'args': argparse.Namespace(lr=1e-3, model='t2t_vit'),
        'metric': 98.2,
    }, page.folder / 'official.pth.tar')
    torch.save({'net': state, 'acc': 98.2, 'epoch': 57}, page.folder / 'finetuned.pth')
    return page


@pytest.fixture(scope='session')
def trained(page) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """A function that gives what an experiment of the page printed, and its last checkpoint; each runs once."""
    done = {}

    def run(experiment):
        if experiment not in done:
            out = page.run(page.command(f'--experiment {experiment}'))
            done[experiment] = out, load(page.folder / 'out' / experiment / 'last.pth.tar')
        return done[experiment]
    return run
