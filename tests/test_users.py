"""Other users of timm's registry: each trains or explains a T2T-ViT as it does any timm model."""
import pytest
import timm
import torch
import torch.nn as nn

from t2t_timm.weights.checkpoint import read_checkpoint

BATCH = 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit')


@pytest.fixture
def data():
    """Images and classes that a step can learn."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 56, 56, generator=generator), torch.arange(BATCH)


def saved_equal(file, model):
    """`convert` finds the weights of a model in a file, without running its pickle."""
    weights, expected = read_checkpoint(file).state_dict, model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in weights.items())


def tokens_to_grid(tokens):
    """Reshape transform of class activation maps: tokens (B, 1 + N, C) to maps (B, C, H, W)."""
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def test_fastai_vision_learner(tmp_path, data):
    vision = pytest.importorskip('fastai.vision.all', reason='pip install fastai')
    images, targets = data
    dataset = [(vision.TensorImage(x), int(y)) for x, y in zip(images, targets, strict=True)]
    loaders = vision.DataLoaders.from_dsets(dataset, dataset, bs=BATCH, device='cpu', num_workers=0)
    learner = vision.vision_learner(
        loaders, 'test_t2t_vit', n_out=BATCH, pretrained=False, normalize=False, path=tmp_path,
        loss_func=vision.CrossEntropyLossFlat(), metrics=[vision.accuracy])
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 1e-3)
    assert learner.get_preds(dl=loaders.valid)[0].shape == (BATCH, BATCH)
    saved_equal(learner.save('own'), learner.model[0].model)  # with the optimizer's state, beside fastai's own head


def test_lightning_module(tmp_path, model, data):
    lightning = pytest.importorskip('lightning', reason='pip install lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=BATCH)
    lightning.Trainer(
        max_steps=5, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(Classifier(), loader)
    saved_equal(next(tmp_path.rglob('*.ckpt')), model)


@pytest.mark.usefixtures('fx_traces_attention')
def test_torchvision_create_feature_extractor(model, data):
    from torchvision.models.feature_extraction import create_feature_extractor
    extractor = create_feature_extractor(
        model.eval(), {'patch_embed': 'stem', 'blocks.1': 'tokens', 'head': 'logits'}).eval()
    x = data[0]
    with torch.no_grad():
        got = extractor(x)
        torch.testing.assert_close(got['logits'], model(x))
        torch.testing.assert_close(got['stem'], model.patch_embed(x))
        expected = model.forward_intermediates(x, [1], intermediates_only=True)[0]
        torch.testing.assert_close(tokens_to_grid(got['tokens']), expected)


def test_grad_cam_with_a_reshape_transform(model, data):
    cam = pytest.importorskip('pytorch_grad_cam', reason='pip install grad-cam')
    targets = pytest.importorskip('pytorch_grad_cam.utils.model_targets', reason='pip install grad-cam')
    norm, x = model.eval().blocks[-1].norm1, data[0][:1]
    with cam.GradCAM(model, [norm], reshape_transform=tokens_to_grid) as explain:
        heat = explain(x, [targets.ClassifierOutputTarget(3)])
    assert heat.shape == (1, 56, 56) and heat.min() >= 0


def test_captum_attributions_are_complete(model, data):
    attr = pytest.importorskip('captum.attr', reason='pip install captum')
    model.eval()
    x = data[0][:2]
    attributions, gap = attr.IntegratedGradients(model).attribute(
        x, target=torch.tensor([1, 2]), n_steps=64, return_convergence_delta=True)
    assert attributions.shape == x.shape and gap.abs().max() < 2e-2
