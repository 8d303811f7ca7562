"""Fixtures: docs/programs.md, and its runs of train.py."""
from typing import Any, Callable

import pytest
from pages import Page, load


@pytest.fixture(scope='session')
def open_page(timm_scripts, tmp_path_factory) -> Callable[..., Page]:
    """A function that opens a page of docs/ in a folder of its own."""
    return lambda name, **env: Page(name, tmp_path_factory.mktemp('page'), **env)


@pytest.fixture(scope='session')
def page(open_page) -> Page:
    """docs/programs.md, its images made, and the embedded weights as the authors release theirs and fine-tuned ones."""
    page = open_page('programs.md')
    for block in page.blocks[1:3]:
        page.run(block)
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
