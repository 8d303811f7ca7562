"""What takes a ViT of timm apart: its parts by their names, its options, and graphs that other tools read."""
import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import memory_efficient_fusion
from timm.layers import AttentionPoolLatent, PatchDropout, PatchEmbed, set_fused_attn
from torch.fx.experimental.proxy_tensor import make_fx

from t2t_timm import set_fused
from t2t_timm.layers import sinusoidal_pos_embed

TOKEN_TYPES = ('performer', 'transformer', 'convolution')
FUSED_TYPES = TOKEN_TYPES[:2]
OPTIONS = {
    'none': dict(),
    'registers': dict(reg_tokens=3),
    'no class token': dict(class_token=False, global_pool='avg'),
    'registers alone': dict(class_token=False, reg_tokens=2, global_pool='avgmax'),
    'no_embed_class': dict(no_embed_class=True, reg_tokens=1),
    'map': dict(global_pool='map'),
    'patch dropout': dict(patch_drop_rate=.5),
}


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', num_classes=5, **dict(dict(img_size=48), **kwargs)).eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 48, 48)


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request):
    return request.param


class TestPatchEmbed:

    @pytest.mark.parametrize('token_type', TOKEN_TYPES)
    @pytest.mark.parametrize('dynamic_img_size', [False, True])
    def test_the_forward_of_timm_in_its_parts(self, options, token_type, dynamic_img_size, images):
        model = make(token_type=token_type, dynamic_img_size=dynamic_img_size, **options)
        x = model.patch_embed(images)
        assert x.shape == ((2, 3, 3, 64) if dynamic_img_size else (2, 9, 64))
        x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
        x = model.norm(model.blocks(x))
        torch.testing.assert_close(x, model.forward_features(images))
        x = model.head(model.head_drop(model.fc_norm(model.pool(x))))
        torch.testing.assert_close(x, model(images))

    def test_attributes_are_those_of_timm(self):
        model = make(img_size=(64, 48))
        patch_embed, expected = model.patch_embed, PatchEmbed((64, 48), 16, embed_dim=64)
        for name in ('patch_size', 'img_size', 'grid_size', 'num_patches', 'flatten', 'strict_img_size',
                     'dynamic_img_pad'):
            assert getattr(patch_embed, name) == getattr(expected, name), name
        assert patch_embed.feat_ratio() == 16 and patch_embed.feat_ratio(as_scalar=False) == (16, 16)
        assert patch_embed.dynamic_feat_size((63, 34)) == (4, 2)  # what the soft splits give, 63 // 16 is 3
        assert patch_embed.proj is patch_embed.project and patch_embed.proj.weight.shape[0] == 64
        with pytest.raises(ValueError, match='patch_size cannot be 8'):
            patch_embed.set_input_size(patch_size=8)
        model.set_input_size(96)
        assert patch_embed.img_size == (96, 96) and patch_embed.grid_size == (6, 6) and patch_embed.num_patches == 36

    def test_another_may_take_its_place(self, images):
        model = make(embed_layer=PatchEmbed)
        assert isinstance(model.patch_embed, PatchEmbed) and model(images).shape == (2, 5)


class TestOptions:

    @pytest.mark.timm('1.0.31')
    def test_tokens_and_positions(self, images):
        model = make(reg_tokens=3)
        assert (model.num_prefix_tokens, model.num_reg_tokens, model.has_class_token) == (4, 3, True)
        assert model.reg_token.shape == (1, 3, 64) and model.forward_features(images).shape == (2, 13, 64)
        table = sinusoidal_pos_embed(10, 64)
        torch.testing.assert_close(model.pos_embed[:, [0, *range(4, 13)]], table)
        assert not model.pos_embed[:, 1:4].any()
        torch.testing.assert_close(make(class_token=False, global_pool='avg').pos_embed, table[:, 1:])
        model = make(no_embed_class=True, reg_tokens=2)
        torch.testing.assert_close(model.pos_embed, table[:, 1:])
        x = model._pos_embed(model.patch_embed(images))
        assert torch.equal(x[:, :3], torch.cat([model.cls_token, model.reg_token], dim=1).expand(2, -1, -1))

    def test_patch_dropout_leaves_tokens_out_in_training(self, images):
        model, seen = make(patch_drop_rate=.5, reg_tokens=1), []
        assert isinstance(model.patch_drop, PatchDropout)
        model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
        model(images)
        model.train()(images).sum().backward()
        assert seen == [11, 6]
        tokens = model.forward_intermediates(images, output_fmt='NLC', intermediates_only=True)
        assert [tuple(t.shape) for t in tokens] == [(2, 4, 64)] * 4  # no whole map in training
        pyramid = timm.create_model('test_t2t_vit', features_only=True, img_size=48, patch_drop_rate=.5)
        assert pyramid.train()(images)[2].shape == (2, 64, 3, 3)

    def test_attention_pooling(self, images):
        model = make(global_pool='map', reg_tokens=1)
        assert isinstance(model.attn_pool, AttentionPoolLatent)
        features = model.forward_features(images)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), model.attn_pool(features[:, 2:]))
        model.reset_classifier(3)
        assert model(images).shape == (2, 3) and model.attn_pool is not None
        model.reset_classifier(3, 'avg')
        assert model(images).shape == (2, 3) and model.attn_pool is None
        with pytest.raises(AssertionError, match='Cannot currently add attention pooling'):
            model.reset_classifier(3, 'map')

    def test_attention_pooling_of_every_width(self):
        for name in timm.list_models('t2t_vit*'):
            small = dict(block_config=(1, 1)) if 'dense' in name else dict(depth=1)
            model = timm.create_model(name, global_pool='map', device='meta', **small)
            assert model.attn_pool.latent.shape == (1, 1, model.num_features)

    @pytest.mark.parametrize('img_size', [(70, 33), (3, 3), (224, 32)])
    def test_sizes(self, options, img_size):
        x = torch.randn(1, 3, *img_size)
        model, dynamic = make(img_size=56, **options), make(img_size=56, dynamic_img_size=True, **options)
        dynamic.load_state_dict(model.state_dict())
        # the table is resampled bicubically, the rows before it untouched
        prefix, table = model.pos_embed.split([model.pos_embed.shape[1] - 16, 16], dim=1)
        model.set_input_size(img_size)
        table = F.interpolate(
            table.unflatten(1, (4, 4)).permute(0, 3, 1, 2), model.patch_embed.grid_size, mode='bicubic', antialias=True)
        expected = torch.cat([prefix, table.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(dict(model.named_buffers())['pos_embed'], expected)
        torch.testing.assert_close(model(x), dynamic(x))
        fresh = make(img_size=img_size, **options)
        fresh.load_state_dict(dynamic.state_dict())  # any route resamples
        torch.testing.assert_close(fresh(x), dynamic(x))

    def test_published_weights(self, options, images):
        published = timm.create_model('test_t2t_vit', pretrained=True).state_dict()
        model = timm.create_model('test_t2t_vit', pretrained=True, pretrained_strict=False, **options)
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in published.items() if k in state and k != 'pos_embed')
        num_grid = model.patch_embed.num_patches
        assert torch.equal(model.pos_embed[:, -num_grid:], published['pos_embed'][:, 1:])
        assert model.pos_embed.shape[1] == num_grid + (0 if model.no_embed_class else model.num_prefix_tokens)

    def test_intermediates_pruning_and_the_getter(self, options, images):
        model = make(**options)
        final, maps = model.forward_intermediates(images, return_prefix_tokens=True)
        torch.testing.assert_close(final, model.forward_features(images))
        for intermediate in maps:
            spatial, prefix = intermediate if model.num_prefix_tokens else (intermediate, None)
            assert spatial.shape == (2, 64, 3, 3)
            assert prefix is None or prefix.shape == (2, model.num_prefix_tokens, 64)
        model.prune_intermediate_layers([1], prune_norm=True)
        assert len(model.blocks) == 2 and model.attn_pool is None and model(images).shape[1] == final.shape[1]
        for feature_cls in ('getter', None):
            net = timm.create_model(
                'test_t2t_vit', features_only=True, feature_cls=feature_cls, img_size=48, **options).eval()
            assert net(images)[-1].shape == (2, 64, 3, 3)

    def test_meta_device_then_to_empty(self, options):
        model = timm.create_model('test_t2t_vit', device='meta', **options).to_empty(device='cpu')
        model.init_weights()
        assert all(t.isfinite().all() for t in model.state_dict().values())
        assert torch.equal(model.pos_embed, timm.create_model('test_t2t_vit', **options).pos_embed)
        w = model.patch_embed.attention1.w
        torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


def test_dense_takes_every_option(options, images):
    kwargs = dict(block_config=(2, 1), num_classes=5, **options)
    model = timm.create_model('t2t_vit_dense', img_size=48, **kwargs).eval()
    assert model.embed_dim == model.num_features == model.feature_info[-1]['num_chs'] == 192
    features, logits = model.forward_features(images), model(images)
    assert features.shape == (2, 9 + model.num_prefix_tokens, 192) and logits.shape == (2, 5)
    torch.testing.assert_close(model.forward_head(features), logits)
    torch.testing.assert_close(torch.jit.script(model)(images), logits)
    other = timm.create_model('t2t_vit_dense', img_size=64, **kwargs).eval()
    other.set_input_size(48)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images), logits)
    other.reset_classifier(3)
    assert other(images).shape == (2, 3)


@pytest.mark.parametrize('name', ['block_fn', 'depth', 'fix_init', 'pre_norm'])
def test_dense_has_no_such_option(name):
    with pytest.raises(ValueError, match=f'T2T-ViT-Dense has no {name}'):
        timm.create_model('t2t_vit_dense', **{name: 1})


def test_dense_is_traced_by_fx(images, fx_traces_attention):
    model = timm.create_model('t2t_vit_dense', img_size=48, block_config=(1, 1)).eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


def test_dense_norms_the_intermediates_that_fit(images):
    model = timm.create_model('t2t_vit_dense', img_size=48, block_config=(2, 1, 1)).eval()
    plain = model.forward_intermediates(images, output_fmt='NLC', intermediates_only=True)
    normed = model.forward_intermediates(images, norm=True, output_fmt='NLC', intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], normed[:-1], strict=True))
    torch.testing.assert_close(normed[-1], model.norm(plain[-1]))


def traced(model, x):
    graph = torch.jit.trace(model, x, check_trace=False).inlined_graph  # the test compares graphs itself
    return [(n.kind(), len(list(n.inputs()))) for n in graph.nodes()]


def exported(model, x):
    return [str(n.target) for n in torch.export.export(model, (x,)).graph.nodes]


class TestGraphs:
    """Exporters record with gradients on and off, in evaluation, and know plain operations alone.

    Of two blocks: one as all but the last, and the last.
    """

    @pytest.mark.parametrize('token_type', TOKEN_TYPES)
    @pytest.mark.parametrize('record', [traced, exported])
    def test_one_and_the_same_with_gradients_on_and_off(self, token_type, record, images):
        model = make(token_type=token_type, depth=2)
        with torch.no_grad():
            off = record(model, images)
        assert len(off) > 50 and record(model, images) == off

    @pytest.mark.parametrize('token_type', TOKEN_TYPES)
    def test_plain_operations_and_a_free_batch(self, token_type, images):
        model, shapes = make(token_type=token_type, depth=2), ({0: torch.export.Dim('batch', max=8)},)
        exported = torch.export.export(model, (images,), dynamic_shapes=shapes)
        program = exported.run_decompositions({})
        names = {n.target.name() for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
        assert 'aten::add.Tensor' in names and not [n for n in names if not n.startswith('aten::')]
        # in place; not known to coremltools' or ExecuTorch's exporters
        assert not [n for n in names if n.split('.')[0].endswith('_')]
        assert not {n.split('.')[0] for n in names} & {'aten::addcmul', 'aten::baddbmm', 'aten::linalg_vector_norm'}
        assert not [n for n in program.graph.nodes if 'memory_format' in n.kwargs and
                    n.kwargs['memory_format'] is torch.channels_last]
        # of computed indices, which coremltools takes for floating point
        assert not [n for n in program.graph.nodes if 'index_select' in str(n.target)]
        # core operations, to which ExecuTorch lowers: the decompositions of split and chunk fix the batch size
        *_, output = exported.run_decompositions().graph.nodes
        logits, = output.args[0]
        assert isinstance(logits.meta['val'].shape[0], torch.SymInt)

    def test_every_option_is_traced_exported_and_scripted(self, options, images):
        model = make(token_type='convolution', depth=2, **options)  # test_switch.py has the other types
        with torch.no_grad():
            expected = model(images)
            traced = torch.jit.trace(model, images, check_trace=False)  # its output is compared here
            for graph in (traced, torch.jit.script(model), torch.export.export(model, (images,)).module()):
                torch.testing.assert_close(graph(images), expected)
            torch.testing.assert_close(traced(images[:1]), expected[:1])

    @pytest.mark.parametrize('token_type', FUSED_TYPES)
    def test_memory_efficient_fusion(self, token_type, images):
        """What timm's --aot-autograd calls, with its gradient."""
        model = make(token_type=token_type, depth=2)
        parameters = list(model.parameters())
        out, expected = memory_efficient_fusion(model)(images), model(images)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), parameters), torch.autograd.grad(expected.sum(), parameters))

    @pytest.mark.parametrize('token_type', FUSED_TYPES)
    def test_one_graph_of_loss_and_gradients(self, token_type, images):
        model = make(token_type=token_type, depth=2, token_drop_rate=0.).train()
        state = {n: p.detach() for n, p in model.named_parameters()}
        targets = torch.tensor([3, 1])

        def loss(state, images):
            return F.cross_entropy(torch.func.functional_call(model, state, (images,)), targets)

        step = torch.func.grad_and_value(loss)
        graph = make_fx(step)(state, images)
        state, images = {n: 1.1 * p for n, p in state.items()}, images.flip(-1)
        actual = graph(state, images)
        expected = {n: p.clone().requires_grad_() for n, p in state.items()}
        with set_fused(False):
            value = loss(expected, images)
        gradients = torch.autograd.grad(value, list(expected.values()))
        torch.testing.assert_close(actual[1], value.detach())
        torch.testing.assert_close(list(actual[0].values()), list(gradients), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize('token_type', FUSED_TYPES)
    def test_vmap_over_stacked_weights(self, token_type, images):
        models = [make(token_type=token_type) for _ in range(2)]
        models[1].load_state_dict({k: v * 1.1 for k, v in models[1].state_dict().items()})
        params, buffers = torch.func.stack_module_state(models)
        out = torch.func.vmap(
            lambda *state: torch.func.functional_call(models[0], state, (images,)))(params, buffers)
        torch.testing.assert_close(out, torch.stack([model(images) for model in models]))

    @pytest.mark.parametrize('token_type', FUSED_TYPES)
    @pytest.mark.parametrize('image_grad', [False, True])
    @pytest.mark.parametrize('create_graph', [False, True])
    def test_gradients_at_once_are_those_one_by_one(self, token_type, image_grad, create_graph):
        """is_grads_batched, and jacobian(vectorize=True); with dropout."""
        model = make(token_type=token_type, img_size=16, depth=2, dtype=torch.float64).train()
        image = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=image_grad)
        logits, inputs = model(image), [*model.parameters(), *[image] * image_grad]
        probes = torch.randn(3, *logits.shape, dtype=torch.float64)
        one_by_one = [torch.autograd.grad(logits, inputs, probe, retain_graph=True) for probe in probes]
        at_once = torch.autograd.grad(logits, inputs, probes, is_grads_batched=True, create_graph=create_graph)
        for actual, expected in zip(at_once, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize('token_type', FUSED_TYPES)
    def test_hessian_with_unfused_attention(self, token_type):
        set_fused_attn(False)
        try:
            model = make(token_type=token_type, img_size=16, depth=1, dtype=torch.float64)
        finally:
            set_fused_attn(True)
        image, direction = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)

        def along(t):
            return model(image + t * direction).logsumexp(1).sum()

        t, h = torch.zeros((), dtype=torch.float64), 1e-4
        numeric = (along(h) - 2 * along(t) + along(-h)) / h ** 2
        torch.testing.assert_close(torch.func.hessian(along)(t), numeric, rtol=1e-3, atol=1e-6)
