"""T2T-ViT written out plainly, as the paper's equations and the published layout have it: a second opinion for tests.

Functions of tensors only, any float dtype; shares no code with the package.
"""
import torch
import torch.nn.functional as F


def layer_norm(state, name, x):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * state[f'{name}.weight'] + state[f'{name}.bias']


def linear(state, name, x):
    y = x @ state[f'{name}.weight'].T
    return y + state[f'{name}.bias'] if f'{name}.bias' in state else y


def soft_split(x, kernel_size, stride, padding):
    x = F.pad(x, [padding] * 4)
    patches = x.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride)  # (B, C, H', W', k, k)
    B, C, H, W = patches.shape[:4]
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(B, H * W, C * kernel_size ** 2), (H, W)


def performer(state, name, u):
    x = linear(state, f'{name}.kqv', layer_norm(state, f'{name}.norm1', u))
    w = state[f'{name}.w']
    k, q, v = x.chunk(3, dim=-1)
    kp, qp = (torch.exp(t @ w.T - (t * t).sum(-1, keepdim=True) / 2) / w.shape[0] ** 0.5 for t in (k, q))
    weights = qp @ kp.transpose(1, 2)  # the attention matrix that linear attention never forms
    a = weights @ v / (weights.sum(-1, keepdim=True) + 1e-8)
    y = v + linear(state, f'{name}.proj', a)
    hidden = F.gelu(linear(state, f'{name}.mlp.0', layer_norm(state, f'{name}.norm2', y)))
    return y + linear(state, f'{name}.mlp.2', hidden)


def attention(state, name, x, num_heads, scale=None):
    B, N, _ = x.shape
    q, k, v = linear(state, f'{name}.qkv', x).reshape(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(B, N, -1), v


def mlp(state, name, x):
    return linear(state, f'{name}.fc2', F.gelu(linear(state, f'{name}.fc1', x)))


def token_transformer(state, name, u):
    x = layer_norm(state, f'{name}.norm1', u)
    a, v = attention(state, f'{name}.attn', x, 1, scale=u.shape[-1] ** -0.5)
    y = v.squeeze(1) + linear(state, f'{name}.attn.proj', a)
    return y + mlp(state, f'{name}.mlp', layer_norm(state, f'{name}.norm2', y))


def tokens_to_token(state, x):
    """Tokens (B, N, C) of images (B, c, H, W), and their grid."""
    name = 'patch_embed.'
    if f'{name}soft_split0.weight' in state:
        for conv, stride, padding in (('soft_split0', 4, 2), ('soft_split1', 2, 1), ('project', 2, 1)):
            x = F.conv2d(x, state[f'{name}{conv}.weight'], state[f'{name}{conv}.bias'], stride, padding)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[-2:])
    layer = performer if f'{name}attention1.w' in state else token_transformer
    for step, split in ((1, (7, 4, 2)), (2, (3, 2, 1))):
        x, (H, W) = soft_split(x, *split)
        x = layer(state, f'{name}attention{step}', x)
        x = x.transpose(1, 2).reshape(x.shape[0], -1, H, W)
    x, grid = soft_split(x, 3, 2, 1)
    return linear(state, f'{name}project', x), grid


def t2t_vit(state, x, num_heads):
    """Normalized tokens (B, 1 + N, C) and logits of the plain architectures, sinusoidal table from the state."""
    x, _ = tokens_to_token(state, x)
    x = torch.cat([state['cls_token'].expand(len(x), -1, -1), x], dim=1) + state['pos_embed']
    depth = 1 + max(int(k.split('.')[1]) for k in state if k.startswith('blocks.'))
    for i in range(depth):
        a, _ = attention(state, f'blocks.{i}.attn', layer_norm(state, f'blocks.{i}.norm1', x), num_heads)
        x = x + linear(state, f'blocks.{i}.attn.proj', a)
        x = x + mlp(state, f'blocks.{i}.mlp', layer_norm(state, f'blocks.{i}.norm2', x))
    x = layer_norm(state, 'norm', x)
    return x, linear(state, 'head', x[:, 0])
