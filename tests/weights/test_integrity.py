"""A file is compared with what the manifest knows of it."""
from dataclasses import replace

import pytest
import timm

from t2t_timm.weights.download import IntegrityError, check_file
from t2t_timm.weights.manifest import load_manifest


@pytest.fixture
def small_file(tmp_path):
    file = tmp_path / 'file.bin'
    file.write_bytes(b'abc')
    return file


SHA256_OF_ABC = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'  # FIPS 180-2, appendix B.1
SHA384_OF_ABC = (
    'cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7')


def test_a_file_is_compared_with_all_that_is_known(small_file):
    known = dict(size=3, sha256=SHA256_OF_ABC, sha384=SHA384_OF_ABC.upper(), sha256_prefix=SHA256_OF_ABC[:8])
    assert check_file(small_file, known, 'x') and check_file(small_file, dict(sha256_prefix='BA'), 'x')
    assert not check_file(small_file, dict(size=3), 'x')


@pytest.mark.parametrize('known', [
    dict(size=4), dict(sha256='0' * 64), dict(sha384='0' * 96), dict(sha256_prefix='00000000'),
    dict(size=3, sha256=SHA256_OF_ABC, sha384='0' * 96)])
def test_a_file_that_differs_is_refused_with_both_values(small_file, known):
    key, value = list(known.items())[-1]
    with pytest.raises(IntegrityError, match=f'the {key} of file.bin should be {value} but is [0-9a-f]+'):
        check_file(small_file, known, 'x')
    assert small_file.exists()  # only what was downloaded is deleted


def test_the_file_inside_the_package_is_checked_too(monkeypatch, small_file):
    weights, name = load_manifest()['weights'], 'test_t2t_vit.mnist'
    monkeypatch.setitem(weights, name, replace(weights[name], path=str(small_file), size=3, sha256='0' * 64))
    with pytest.raises(IntegrityError, match='should be 0{64} but is ba7816bf'):
        timm.create_model('test_t2t_vit', pretrained=True)
    assert small_file.exists()
