"""Pictures: what they draw is the model's attention, and they are readable PNG files of any model and size."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import AttentionExtract

from t2t_timm.cli import main
from t2t_timm.commands.images import ImageReader
from t2t_timm.commands.pictures import draw_attention, draw_features, extract_attention, read_image
from t2t_timm.errors import UserError

pytest.importorskip('matplotlib', reason='pip install t2t-timm[plot]')


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (12, 18, 3), dtype=np.uint8)
    file = tmp_path / 'photo.png'
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(file)
    return str(file)


def make_model(name='test_t2t_vit', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def model_input(image, model):
    return ImageReader(model).normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


@pytest.mark.parametrize('method', ['fx', 'hook'])
def test_timm_attention_extract(method):
    model, x = make_model(), torch.randn(2, 3, 56, 56)
    if method == 'fx':  # its nodes are not in the graph
        with pytest.raises(RuntimeError, match=r"No node names found matching \['\*attn\.softmax'\]"):
            AttentionExtract(model, method=method)
    else:  # the layer behind the softmax is not called, so its hook sees nothing
        assert not AttentionExtract(model, method=method)(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        extracted = AttentionExtract(model, method=method)(x)
    assert len(extracted) == len(model.blocks)
    for attention in extracted.values():
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 4, 17))


def test_attention_of_blocks_is_timms(photo):
    model = make_model()
    image = read_image(photo, model)
    drawn = extract_attention(model, image)
    with torch.no_grad():
        matrices = [a[0].mean(dim=0) for a in AttentionExtract(model)(model_input(image, model)).values()]
    rollout = torch.eye(17)
    for matrix, shown in zip(matrices, drawn.blocks, strict=True):
        np.testing.assert_allclose(shown, matrix[0, 1:].reshape(4, 4), atol=1e-6)
        rollout = (0.5 * matrix + 0.5 * torch.eye(17)) @ rollout
    np.testing.assert_allclose(drawn.rollout, rollout[0, 1:].reshape(4, 4), atol=1e-6)


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_attention_of_token_steps_gives_their_output(photo, token_type):
    """Attention times values, then the rest of the step by its definition, is what the step gives."""
    model = make_model(token_type=token_type)
    image = read_image(photo, model)
    x = model_input(image, model)
    step = model.patch_embed.attention1
    with torch.no_grad():
        u = step.norm1(torch.nn.functional.unfold(x, 7, stride=4, padding=2).transpose(1, 2))[0]
        v, proj = ((step.kqv(u)[:, 128:], step.proj) if token_type == 'performer'
                   else (step.attn.qkv(u)[:, 128:], step.attn.proj))
        output = step(x)[0].flatten(1).T
        for (y, x), attention, kept in extract_attention(model, image).steps[0]:
            i = y * 14 + x
            a = kept * torch.from_numpy(attention).float().flatten() @ v
            out = v[i] + proj(a)
            out = out + step.mlp(step.norm2(out))
            torch.testing.assert_close(out, output[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('kwargs', [
    dict(), dict(token_type='transformer', img_size=(48, 80)), dict(token_type='convolution'),
    dict(in_chans=1, img_size=(90, 40)), dict(depth=15),
])
@pytest.mark.parametrize('draw', [draw_attention, draw_features])
def test_no_text_overlaps(photo, kwargs, draw):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    model = make_model(**kwargs)
    figure = draw(model, read_image(photo, model), 'a model')
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # lays it out
    axes = [a for axis in figure.axes for a in (axis, *axis.child_axes)]
    texts = [f._suptitle for f in (figure, *figure.subfigs)] + [a.title for a in axes]
    bars = [a for a in axes if a.axison]
    for bar in bars:
        texts += [bar.yaxis.label] + [t for t in bar.get_yticklabels() if bar.bbox.y0 - 2 <= t.get_window_extent().y1]
    texts += [t for a in axes for t in a.texts]
    texts = [t for t in texts if t.get_text()]
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts]
    assert len(texts) > 10 and len(bars) >= 2
    for i, (a, text) in enumerate(zip(boxes, texts, strict=True)):
        assert a.x0 >= -1 and a.y0 >= -1 and a.x1 <= figure.bbox.x1 + 1 and a.y1 <= figure.bbox.y1 + 1, text
        for b, other in zip(boxes[:i], texts[:i], strict=True):
            assert not a.overlaps(b), f'{text.get_text()!r} lies over {other.get_text()!r}'


def test_classes_are_the_models(photo, embedded):
    image = read_image(photo, embedded)
    with torch.no_grad():
        probabilities = embedded(model_input(image, embedded))[0].softmax(dim=0)
    figure = draw_attention(embedded, image, 'a model')
    drawn = [[t.get_text() for t in a.texts] for a in figure.subfigs[0].axes if a.texts]
    names, likeliest = embedded.pretrained_cfg['label_names'], probabilities.topk(5).indices.tolist()
    assert drawn == [[text for i in likeliest for text in (names[i], f'{100 * probabilities[i]:.1f} %')]]


def test_random_weights_are_named_and_give_no_classes(photo, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr('t2t_timm.commands.pictures.save_picture', lambda figure, path: figures.append(figure))
    for command in ('attention', 'features'):
        assert main([command, photo, '--model', 'test_t2t_vit', '--untrained', '--out', str(tmp_path / 'a.png')]) == 0
    assert all('test_t2t_vit, random weights, 56 x 56' in figure.get_suptitle() for figure in figures)
    assert not [t for axis in figures[0].axes for t in axis.texts]


def test_panels_of_a_performer_that_uses_nothing_are_left_out(embedded, digits, caplog):
    files = sorted(digits.iterdir())[::12]
    numbers = set()
    caplog.set_level('INFO', 't2t_timm')
    for file in files:
        caplog.clear()
        image = read_image(str(file), embedded)
        kept = [k for step in extract_attention(embedded, image).steps for *_, k in step]
        titles = [axis.get_title() for axis in draw_attention(embedded, image, 'a model').axes]
        numbers.add(sum(title.startswith('step ') for title in titles))
        assert sum(title.startswith('step ') for title in titles) == sum(k >= 0.5 for k in kept)
        assert sum('is not drawn' in line for line in caplog.messages) == (max(kept[:3]) < .5) + (max(kept[3:]) < .5)
    assert numbers == {0, 1}  # digits of both kinds


def test_no_classes_without_a_classifier(photo):
    model = make_model(num_classes=0)
    figure = draw_attention(model, read_image(photo, model), 'a model')
    assert not [a for a in figure.subfigs[0].axes if a.texts]


@pytest.mark.parametrize('name, kwargs', [
    ('t2t_vit_dense', dict(block_config=(2, 1, 1))), ('t2t_vit_16_ghost', dict(depth=3)),
    ('t2t_vit_14_se', dict(depth=3))])
def test_other_architectures(photo, name, kwargs):
    model = make_model(name, img_size=48, **kwargs)
    image = read_image(photo, model)
    attention = extract_attention(model, image)
    assert len(attention.blocks) == sum(hasattr(b, 'attn') for b in model.blocks)
    assert all(m.shape == (3, 3) and 0 < m.sum() <= 1 for m in attention.blocks)
    draw_features(model, image, name, [1, len(model.blocks)])


@pytest.mark.parametrize('command', ['attention', 'features'])
def test_commands(photo, tmp_path, command):
    out = tmp_path / 'picture.PNG'
    assert main([command, photo, '--model', 'test_t2t_vit', '--img-size', '40', '64', '--out', str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == 'PNG' and min(picture.size) > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ['photo.png', 'picture.PNG']


@pytest.mark.parametrize('size, words', [
    (['60', '90'], None),
    (['56'], 'the middle 67% of its width, since the model reads 56 x 56 pixels'),
    (['56', '112'], 'the middle 75% of its height, since the model reads 56 x 112 pixels'),
])
def test_what_is_cut_off_is_said(photo, tmp_path, capsys, size, words):
    out = tmp_path / 'picture.png'
    assert main([
        'features', photo, '--model', 'test_t2t_vit', '--untrained', '--img-size', *size, '--out', str(out)]) == 0
    err = capsys.readouterr().err
    assert words in err if words else 'middle' not in err


@pytest.mark.slow
@pytest.mark.parametrize('command, size', [('attention', '1024'), ('features', '1040')])
def test_largest_size(photo, tmp_path, command, size):
    out = tmp_path / 'picture.png'
    assert main([command, photo, '--model', 'test_t2t_vit', '--img-size', size, '--out', str(out)]) == 0
    assert out.stat().st_size > 10000


@pytest.mark.parametrize('arguments, message', [
    (['features', 'PHOTO', '--blocks', '9'], 'has blocks 1 to 4, not 9'),
    (['features', 'PHOTO', '--blocks', '0'], 'has blocks 1 to 4, not 0'),
    (['attention', 'PHOTO', '--img-size', '1025'], 'up to 1024 x 1024 pixels'),
])
def test_mistakes(photo, tmp_path, capsys, arguments, message):
    arguments = [photo if a == 'PHOTO' else a for a in arguments]
    assert main([*arguments, '--model', 'test_t2t_vit', '--untrained', '--out', str(tmp_path / 'picture.png')]) == 1
    line, = [line for line in capsys.readouterr().err.splitlines() if 'the picture shows the middle' not in line]
    assert message in line
    assert not (tmp_path / 'picture.png').exists()


def test_no_channels_to_show(photo):
    with pytest.raises(UserError, match='the model reads 5'):
        read_image(photo, make_model(in_chans=5))
