"""The snippets of the model cards: each runs as it is pasted."""

from ..layers import SOFT_SPLITS, soft_split_size
from ..recipes import recipe_names
from ..version import REPOSITORY
from ..weights.manifest import Published
from .complexity import Complexity

__all__ = [
    'DIGIT', 'PHOTO', 'classification_snippet', 'features_snippet', 'install_snippet', 'scripts_line',
    'transformers_snippet',
]

PHOTO = 'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg'
DIGIT = 'digits/3_three/1509.png'


def install_snippet(more: str = '') -> str:
    """Return how to install the package, in a shell; `more` goes on."""
    return f'```sh\npip install git+{REPOSITORY}{more}\n```'


def classification_snippet(name: str, image: str, mode: str, label: str) -> str:
    """Return how to classify an image, a file or a URL; `label` is the Python of class i's name."""
    is_url = image.startswith('https://')
    opened = f"urlopen(\n    '{image}'\n)" if is_url else f"'{image}'"
    return f'''\
### Image Classification

```python
{'from urllib.request import urlopen' + chr(10) * 2 if is_url else ''}import timm
import torch
from PIL import Image

image = Image.open({opened}).convert('{mode}')
model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.no_grad():
    probabilities = model(transform(image)[None]).softmax(dim=1)[0]
for i in probabilities.argsort(descending=True)[:5].tolist():
    print(f'{{probabilities[i]:.3f}}', {label})
```

In a shell: `t2t-timm classify IMAGE --model {name}`.
'''


def features_snippet(name: str, cost: Complexity) -> str:
    """Return how to get feature maps and embeddings."""
    sizes = list(zip(*map(_map_sizes, cost.input_size[1:]), strict=True))
    num_tokens = 1 + sizes[2][0] * sizes[2][1]
    maps = ', '.join(f'(1, {c}, {h}, {w})' for c, (h, w) in zip((64, 64, cost.num_features), sizes, strict=True))
    return f'''\
### Feature Maps and Embeddings

```python
import timm
import torch

images = torch.randn(1, {", ".join(map(str, cost.input_size))})  # instead of transform(image)[None]
pyramid = timm.create_model('{name}', pretrained=True, features_only=True).eval()
maps = pyramid(images)  # strides 4, 8 and 16: {maps}
embedder = timm.create_model('{name}', pretrained=True, num_classes=0).eval()
embedding = embedder(images)  # (1, {cost.num_features})
tokens = embedder.forward_features(images)  # (1, {num_tokens}, {cost.num_features}), class token first
```
'''


def transformers_snippet(repo: str, image: str) -> str:
    """Return how to classify with Transformers; `repo` may be a folder."""
    return f'''\
### Transformers

```python
from transformers import pipeline  # pip install transformers

classify = pipeline('image-classification', model='{repo}')
print(classify('{image}'))
```
'''


def scripts_line(name: str, entry: Published) -> str:
    """Return how to evaluate and train an architecture.tag with timm's scripts, in a line."""
    architecture = name.split('.')[0]
    recipe = next(r for r in (f'{architecture}_{entry.dataset}', architecture) if r in recipe_names())
    data, more = 'DATA', ''
    if '.tl_' in name:
        more = ' The recipe trains without token labeling, which train.py does not know.'
    elif entry.dataset == 'mnist':
        data = 'DIGITS'
        more = (
            ' `t2t-timm digits` writes the 1,000 held-out digits, which are not for training; `python '
            'tools/make_digits.py DIGITS`, in a checkout of t2t-timm, writes 4,000 to train on, and these.')
    return (
        f"With timm's scripts: `python validate.py --data-dir DATA --model {name} --pretrained` and `python train.py "
        f'--data-dir {data} --config $(t2t-timm recipe {recipe})`.{more}')


def _map_sizes(size: int) -> list[int]:
    sizes = []
    for split in SOFT_SPLITS:
        size = soft_split_size(size, *split)
        sizes.append(size)
    return sizes
