"""Registration without an import: the start-up hook, its switch, and what happens when it cannot work.

Each case is a process of its own, with the package installed (wheel or editable) as a user has it. Those of FORKED come
from one process that was started with the hook off and has imported torch, most of what timm's import costs.
"""
import os
import runpy
import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import _t2t_timm_autoload

COUNT = "import timm; print(len(timm.list_models(['t2t_vit*', 'test_t2t_vit'])))"
NUM_MODELS = '17'
ON = '''import os
del os.environ['T2T_TIMM_AUTOLOAD']
import _t2t_timm_autoload; _t2t_timm_autoload.install()  # as t2t_timm.pth has it
'''
FORKED = {  # what happens: code, what it prints, and what it says once
    **{order: (f'{ON}{order}\n{COUNT}', NUM_MODELS, '') for order in (
        'import t2t_timm, timm', 'import timm.models, t2t_timm', 'import timm.layers')},
    'switched off and still importable': (f'{COUNT}\nimport t2t_timm\n{COUNT}', f'0 {NUM_MODELS}', ''),
    'timm gets only what models need': (ON + '''if True:
        import sys
        import timm
        imported = {name.split('.')[1] for name in sys.modules if name.startswith('t2t_timm.')}
        print(*sorted(imported & {'models', 'hub', 'commands', 'cli', 'recipes', 'digits'}))''', 'models', ''),
    'a model that timm has itself is left alone': ('''if True:
        import logging
        logging.basicConfig(level=logging.DEBUG)
        import timm
        import torch
        @timm.models.register_model
        def t2t_vit_14(pretrained=False, **kwargs):
            return torch.nn.Identity()
        import t2t_timm
        print(type(timm.create_model('t2t_vit_14')).__name__, len(timm.list_models('t2t_vit*')))''',
        'Identity 16', 'timm has its own t2t_vit_14'),
    'python -m t2t_timm scripts/script.py --flag x': ('''if True:
        import runpy, sys
        sys.argv = ['', 'scripts/script.py', '--flag', 'x']
        runpy.run_module('t2t_timm', run_name='__main__', alter_sys=True)''', "['--flag', 'x'] 5 16 __main__", ''),
    'a worker loads a whole model, and has imported nothing': ('''if True:
        import sys
        import torch
        assert not {'timm', 't2t_timm'} & set(sys.modules)
        model, images, expected = torch.load('model.pt', weights_only=False)
        torch.testing.assert_close(model(images), expected)
        import timm
        print(type(model).__name__, timm.is_model('t2t_vit_14'))''', 'T2TViT True', ''),
    'a package that cannot import': (ON + '''if True:
        import importlib.metadata
        import sys
        sys.modules['t2t_timm.layers'] = None  # as if a symbol of a newer timm were missing
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: '0.9.16' if name == 'timm' else version(name)
        import timm
        import timm.models
        print(len(timm.list_models()) > 1000, len(timm.list_models('t2t*')))''',
        'True 0', 't2t-timm could not register its models with timm'),
}
FORK = '''
    import multiprocessing, os, subprocess, sys
    import torch, torchvision

    def run(code):
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        exec(code, {'__name__': '__main__'})

    for i, code in enumerate(sys.argv[1:]):
        with open(f'{i}.out', 'w') as out, open(f'{i}.err', 'w') as err:
            if not hasattr(os, 'fork'):
                subprocess.run([sys.executable, '-c', code], stdout=out, stderr=err)
            else:
                child = multiprocessing.get_context('fork').Process(target=run, args=(code,))
                child.start()
                child.join()
'''


def run_python(folder, code, *args, **more):
    """Run Python code in a fresh process and return its output, with `more` variables of the environment."""
    unset = ('T2T_TIMM_AUTOLOAD', 'PYTHONPATH', 'PYTHONWARNINGS')  # a warning is looked for
    env = {k: v for k, v in os.environ.items() if k not in unset} | more
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *args], env=env, cwd=folder, check=True, text=True,
        capture_output=True)


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
    """(stdout, stderr) of FORKED, by name."""
    folder = tmp_path_factory.mktemp('forked')
    model, images = timm.create_model('test_t2t_vit', depth=1).eval(), torch.randn(1, 3, 56, 56)
    torch.save((model, images, model(images).detach()), folder / 'model.pt')
    (folder / 'scripts').mkdir()
    (folder / 'scripts' / 'helper.py').write_text('VALUE = 5')
    (folder / 'scripts' / 'script.py').write_text(
        'import sys, helper, timm\nprint(sys.argv[1:], helper.VALUE, len(timm.list_models("t2t*")), __name__)')
    run_python(folder, FORK, *(code for code, _, _ in FORKED.values()), T2T_TIMM_AUTOLOAD='0')
    return {
        name: [(folder / f'{i}.{end}').read_text() for end in ('out', 'err')] for i, name in enumerate(FORKED)}


@pytest.mark.parametrize('name', FORKED)
def test_what_happens(forked, name):
    (out, err), (_, expected, said) = forked[name], FORKED[name]
    assert ' '.join(out.split()) == expected, err
    assert 'Overwriting' not in err
    assert err.count(said) == 1 if said else 'Warning' not in err, err


def test_a_failure_names_the_versions(forked):
    _, err = forked['a package that cannot import']
    assert 'It needs timm>=' in err and 'timm 0.9.16 is installed' in err


def test_nothing_heavy_is_imported_until_a_script_imports_timm(tmp_path):
    done = run_python(tmp_path, f"""if True:
        import sys
        print(*[m for m in ('torch', 'timm', 't2t_timm', 'yaml', '_t2t_timm_autoload') if m in sys.modules])
        {COUNT}""")
    assert done.stdout.split() == ['_t2t_timm_autoload', NUM_MODELS]


@pytest.mark.parametrize('value, expected', [('0', 0), ('False', 0), ('no', 0), ('1', 1), ('', 1)])
def test_values_of_the_switch(monkeypatch, value, expected):
    calls = []
    monkeypatch.setattr(_t2t_timm_autoload, 'register', lambda: calls.append(1))
    monkeypatch.setenv('T2T_TIMM_AUTOLOAD', value)
    _t2t_timm_autoload.install()  # timm.models has been imported
    assert len(calls) == expected


def test_a_script_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['t2t_timm', 'no.py'])
    with pytest.raises(SystemExit, match='no script at no.py'):  # which Python prints, and exits with 1
        runpy.run_module('t2t_timm', run_name='__main__')
