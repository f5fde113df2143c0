"Each kind of image data with a live teacher: the loss is inferred, and that of a batch is the formula"
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
from types import SimpleNamespace
import pytest,torchvision
from sklearn.datasets import load_digits

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore')
KD = KnowledgeDistillation

# -- the formula, in float64 and without fastkd
def kl(s, t, T=5., axis=1):
    p,q = [(o.double()/T).log_softmax(axis) for o in (t,s)]
    return T**2*(p.exp()*(p-q)).sum(axis)
def bkl(s, t, T=5.):
    p,q = (t.double()/T).sigmoid(),(s.double()/T).sigmoid()
    return T**2*(p*(p/q).log()+(1-p)*((1-p)/(1-q)).log())
def ce(s, y, **kw): return F.cross_entropy(s.double(), y, **kw)
def bce(s, y, **kw): return F.binary_cross_entropy_with_logits(s.double(), y.double(), **kw)

def half_kd(s, t, y): return .5*ce(s, y)+.5*kl(s, t).mean()
def half_bkd(s, t, y): return .5*bce(s.view(y.shape), y)+.5*bkl(s, t).mean()
def mse(s, y): return (s.double()-y.double().view(s.shape)).pow(2).mean()
def half_mse(s, t, y): return .5*mse(s, y)+.5*mse(s, t)

class Spy(Callback):
    "What each training step saw, right after `KnowledgeDistillation`"
    order,run_valid = KD.order+.5,False
    def __init__(self): self.steps = []
    def after_loss(self):
        plain = lambda os: [o.as_subclass(Tensor).clone() for o in os]
        pred = self.pred.detach().as_subclass(Tensor).clone()
        self.steps.append(SimpleNamespace(x=plain(self.xb), y=plain(self.yb), pred=pred, loss=self.learn.loss.item(), grad=self.learn.loss_grad.item()))

def fit(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kw)
def ask(m, *x):
    with torch.no_grad(): return m.eval()(*x).as_subclass(Tensor)
def weights(m): return {k:v.clone() for k,v in m.state_dict().items()}

def check(learn, teacher, formula, says=None, loss=KDLoss, tol=1e-5, n=1, kd=None, **kw):
    "Fit one epoch; the loss of each batch is `formula(student's, teacher's, *labels)`, the teacher's answer `says(*inputs)`"
    models = Teacher(teacher).models if isinstance(teacher, (Learner,nn.Module)) else as_teacher(teacher).models
    was = [weights(m) for m in models]
    if says is None: says = partial(ask, models[0])
    kd,spy = KD(teacher, kd, **kw),Spy()
    fit(learn, n, cbs=[kd,spy])
    assert type(kd.loss_kd) is loss and len(spy.steps)>=2
    for o in spy.steps:
        want = formula(o.pred, says(*o.x), *o.y)
        assert want>0
        for got in (o.loss,o.grad): torch.testing.assert_close(torch.tensor(got), want.float(), rtol=tol, atol=tol)
    # the teacher has not learned anything
    for m,w in zip(models, was): assert all(torch.equal(v, w[k]) for k,v in m.state_dict().items())
    # the student is used as ever
    with learn.no_bar(): assert np.isfinite(learn.validate()[0]) and len(learn.get_preds()[0])==len(learn.dls.valid_ds)
    return spy.steps

# -- scans of digits as PIL images
scans = load_digits()
def image(i, size=16, mode='RGB'): return PILImage.create(Image.fromarray(np.uint8(scans.images[i]*15.9)).resize((size,size)).convert(mode))
def digit(i): return str(scans.target[i])
def dls_of(blocks, get_y, get_x=image, n=48, bs=16, n_inp=None, **kw):
    if n_inp is None: kw['get_x'],kw['get_y'] = get_x,get_y
    else: kw['getters'],kw['n_inp'] = [*get_x,get_y],n_inp
    set_seed(0)
    return DataBlock(blocks=blocks, get_items=noop, splitter=IndexSplitter(range(n, n+16)), **kw).dataloaders(range(n+16), bs=bs, num_workers=0)
def learner(dls, model, seed=0, **kw):
    set_seed(seed, reproducible=True)
    return Learner(dls, model() if not isinstance(model, nn.Module) else model, **kw)
def cnn(c, widths=(4,8), ch=3, seed=0, **kw):
    set_seed(seed, reproducible=True)
    return tiny_cnn(widths, c, ch, **kw)
def warm(learn, n=1):
    "A teacher that has seen something"
    fit(learn, n)
    return learn

class TestSingleLabel:
    blocks = (ImageBlock,CategoryBlock(vocab=[str(i) for i in range(10)], sort=False))
    def test_augmented(self):
        "The teacher answers for what the student sees: the same crop, the same flip, at its own normalisation"
        norm = Normalize.from_stats([.5]*3, [.25]*3)
        dls = dls_of(self.blocks, digit, item_tfms=RandomResizedCrop(16, min_scale=.5), batch_tfms=[*aug_transforms(size=12),norm])
        t = cnn(10, (8,16), seed=1)
        def says(x): return ask(t, (x*.25+.5-.2)/.1)
        check(learner(dls, cnn(10)), Teacher(t, stats=(.2,.1)), half_kd, says)
    def test_learner_as_teacher(self):
        t = warm(learner(dls_of(self.blocks, digit, batch_tfms=Normalize.from_stats(*imagenet_stats)), cnn(10, (8,16), seed=1)))
        m,s = [tensor(o)[:,None,None] for o in imagenet_stats]
        dls = dls_of(self.blocks, digit)
        check(learner(dls, cnn(10)), t, lambda s,t,y: .3*ce(s, y)+.7*kl(s, t, 2.).mean(), lambda x: ask(t.model, (x-m)/s), T=2., alpha=.7)

class TestMultiLabel:
    names = ['even','large','loop']
    def dls(self, vocab, f=None, **kw):
        has = lambda o: dict(even=o%2==0, large=o>4, loop=o in (0,6,8,9), zero=o==0)
        return dls_of((ImageBlock,MultiCategoryBlock(vocab=vocab)), lambda i: [k for k,v in has(scans.target[i]).items() if v and k in vocab], **kw)
    def test_bernoulli(self):
        check(learner(self.dls(self.names), cnn(3)), cnn(3, (8,16), seed=1), half_bkd, loss=BinaryKDLoss)
    def test_other_names(self):
        "A teacher with another order of labels, and one more"
        other = ['zero','loop','even','large']
        t,dls = warm(learner(self.dls(other), cnn(4, (8,16), seed=1))),self.dls(self.names)
        assert list(t.dls.vocab)==other and list(dls.vocab)==self.names
        check(learner(dls, cnn(3)), t, lambda s,t,y: .6*bce(s, y)+.4*bkl(s, t, 2.).mean(),
            lambda x: ask(t.model, x)[:,[2,3,1]], loss=BinaryKDLoss, T=2., alpha=.4)
    def test_one_label(self): check(learner(self.dls(['even']), cnn(1)), cnn(1, (8,16), seed=1), half_bkd, loss=BinaryKDLoss)
    def test_weighted(self):
        "The weights of labels are the task's alone"
        w = tensor(3.,1.,.5)
        check(learner(self.dls(self.names), cnn(3), loss_func=BCEWithLogitsLossFlat(pos_weight=w, flatten=False)), cnn(3, (8,16), seed=1),
            lambda s,t,y: .5*bce(s, y, pos_weight=w.double())+.5*bkl(s, t).mean(), loss=BinaryKDLoss)
    def test_mixed(self):
        "MixUp of vectors of labels"
        check(learner(self.dls(self.names), cnn(3), cbs=MixUp()), cnn(3, (8,16), seed=1), half_bkd, loss=BinaryKDLoss)

class TestOneColumn:
    "Yes or no by one number"
    def dls(self, vocab=('no','yes')): return dls_of((ImageBlock,CategoryBlock(vocab=vocab, sort=False)), lambda i: ('no','yes')[scans.target[i]%2])
    def learner(self): return learner(self.dls(), cnn(1), loss_func=BCEWithLogitsLossFlat())
    def test_bce(self):
        check(self.learner(), cnn(1, (8,16), seed=1), half_bkd, loss=BinaryKDLoss)
        t = warm(learner(self.dls(), cnn(1, (8,16), seed=1), loss_func=BCEWithLogitsLossFlat()))
        check(self.learner(), t, half_bkd, loss=BinaryKDLoss)
    def test_other_way_round(self):
        "One column cannot be put in order by name: refused, with the sign as the way out"
        t = warm(learner(self.dls(('yes','no')), cnn(1, (8,16), seed=1), loss_func=BCEWithLogitsLossFlat()))
        with pytest.raises(ValueError, match='answers with 1 values, its vocabulary names 2'): fit(self.learner(), cbs=KD(t))
        check(self.learner(), Teacher(t.model, output=lambda z: -z), half_bkd, lambda x: -ask(t.model, x), loss=BinaryKDLoss)
    def test_two_columns(self): check(learner(self.dls(), cnn(2)), cnn(2, (8,16), seed=1), half_kd)
    def test_shapes(self):
        with pytest.raises(ValueError, match='shape'): fit(self.learner(), cbs=KD(nn.Sequential(cnn(1), nn.Flatten(0))))

class TestOtherLosses:
    blocks = TestSingleLabel.blocks
    def test_focal(self):
        def focal(s, y, g=2.):
            c = ce(s, y, reduction='none')
            return ((1-(-c).exp())**g*c).mean()
        for lf in (FocalLossFlat(), FocalLoss()):
            check(learner(dls_of(self.blocks, digit), cnn(10), loss_func=lf), cnn(10, (8,16), seed=1), lambda s,t,y: .5*focal(s, y)+.5*kl(s, t).mean())
    def test_weighted_classes(self):
        w = torch.linspace(.5, 2, 10)
        check(learner(dls_of(self.blocks, digit), cnn(10), loss_func=CrossEntropyLossFlat(weight=w)), cnn(10, (8,16), seed=1),
            lambda s,t,y: .5*ce(s, y, weight=w.double())+.5*kl(s, t).mean())
    def test_unknown(self):
        "A loss that says nothing about what predictions are"
        def mine(p, y): return F.cross_entropy(p, y.as_subclass(Tensor))
        dls = dls_of(self.blocks, digit)
        with pytest.raises(ValueError, match='no response loss is known.*loss=KDLoss'): fit(learner(dls, cnn(10), loss_func=mine), cbs=KD(cnn(10)))
        check(learner(dls, cnn(10), loss_func=mine), cnn(10, (8,16), seed=1), lambda s,t,y: .5*ce(s, y)+.5*kl(s, t, 3.).mean(), kd=KDLoss(T=3.))

# -- regression
def center(i):
    "Where the ink of a scan is, as fractions of its width and height"
    w,k = scans.images[i],np.arange(8)+.5
    return [float(w.sum(0)@k/w.sum()/8), float(w.sum(1)@k/w.sum()/8)]
class TestRegression:
    def dls(self, n_out):
        return dls_of((ImageBlock,RegressionBlock(n_out=n_out)), lambda i: center(i)[0] if n_out==1 else (center(i)+[scans.images[i].mean()/16])[:n_out])
    @pytest.mark.parametrize('n_out', [1,3])
    def test_numbers(self, n_out):
        check(learner(self.dls(n_out), cnn(n_out)), cnn(n_out, (8,16), seed=1),
            lambda s,t,y: .4*mse(s.view(y.shape), y)+.6*mse(s, t), loss=MSELogitsLoss, alpha=.6)
    @pytest.mark.parametrize('lf,f', [(L1LossFlat(), F.l1_loss), (nn.SmoothL1Loss(beta=.2), partial(F.smooth_l1_loss, beta=.2)),
        (nn.HuberLoss(delta=.05), partial(F.huber_loss, delta=.05))])
    def test_losses(self, lf, f):
        check(learner(self.dls(2), cnn(2), loss_func=lf), cnn(2, (8,16), seed=1),
            lambda s,t,y: .5*f(s.double(), y.double())+.5*f(s.double(), t.double()), loss=MSELogitsLoss)
    def test_range(self):
        "`y_range`: both answer in the range"
        net = lambda w,seed: nn.Sequential(cnn(2, w, seed=seed), SigmoidRange(-.1,1.1))
        check(learner(self.dls(2), net((4,8), 0)), net((8,16), 1), half_mse, loss=MSELogitsLoss)
    def test_no_temperature(self):
        with pytest.raises(ValueError, match='no temperature'): fit(learner(self.dls(2), cnn(2)), cbs=KD(cnn(2), T=2.))
    def test_ensemble(self):
        "Values are averaged as they are"
        a,b = cnn(2, (8,16), seed=1),cnn(2, (8,), seed=2)
        check(learner(self.dls(2), cnn(2)), Ensemble([a,b], weights=[3,1]), half_mse, lambda x: .75*ask(a, x)+.25*ask(b, x), loss=MSELogitsLoss)
    def test_image_to_image(self):
        "Dense regression: a small autoencoder"
        dls = dls_of((ImageBlock,ImageBlock), image)
        check(learner(dls, cnn(3, dense=True), loss_func=MSELossFlat()), cnn(3, (8,16), seed=1, dense=True), half_mse, loss=MSELogitsLoss)

class TestKeypoints:
    n_pts = 3
    def get_y(self, i, size=20):
        "The centre, the top left and the bottom right of the ink, in pixels"
        on = np.argwhere(scans.images[i]>4)
        return tensor([[c*size for c in center(i)], (on.min(0)[::-1]/8*size).tolist(), ((on.max(0)[::-1]+1)/8*size).tolist()]).float()
    def dls(self, size=16, **kw):
        return dls_of((ImageBlock,PointBlock), lambda i: self.get_y(i), lambda i: image(i, 20), item_tfms=Resize(size, method='squish'), **kw)
    def test_scaled(self):
        "Points go from pixels to -1..1, whatever the size; the loss is that of the scaled ones"
        dls = self.dls()
        steps = check(learner(dls, cnn(6)), cnn(6, (8,16), seed=1), half_mse, loss=MSELogitsLoss)
        assert get_c(dls)==6 and steps[0].y[0].shape==(16,3,2)
        want = torch.stack([self.get_y(i)/20*2-1 for i in range(48)])
        assert all((want-y).abs().amax((1,2)).min()<1e-5 for o in steps for y in o.y[0])
    def test_augmented(self):
        "The teacher sees the flipped and rotated image, so its points belong to it"
        check(learner(self.dls(batch_tfms=[Rotate(20., p=1.),Flip()]), cnn(6)), cnn(6, (8,16), seed=1), half_mse, loss=MSELogitsLoss)
    def test_larger_teacher(self):
        "Coordinates of -1..1 mean the same at any size"
        t = warm(learner(self.dls(32), cnn(6, (8,16), seed=1)))
        up = partial(F.interpolate, size=(32,32), mode='bilinear', antialias=True)
        check(learner(self.dls(), cnn(6)), Teacher(t, size=32), half_mse, lambda x: ask(t.model, up(x)), loss=MSELogitsLoss)
    def test_predict(self):
        "In pixels again, with the callback attached"
        learn = learner(self.dls(), cnn(6), cbs=KD(cnn(6, (8,16), seed=1)))
        fit(learn)
        with learn.no_bar(): pts = learn.predict(image(50, 20))[0]
        assert pts.shape==(3,2) and pts.abs().max()>1

# -- segmentation
VOID = 255
def mask(i, size=16):
    "Empty, light or dark; the rim of the ink is not labelled"
    x = np.asarray(image(i, size, 'L'))/255
    return PILMask.create(np.where((x>.1)&(x<.3), VOID, (x>.2).astype(int)+(x>.6)).astype(np.uint8))
def encoder(widths=(4,8), ch=3, seed=0):
    set_seed(seed, reproducible=True)
    return nn.Sequential(*tiny_cnn(widths, ch=ch)[:len(widths)])
def unet(widths=(4,8), c=3, size=16, seed=0, **kw): return DynamicUnet(encoder(widths, seed=seed), c, (size,size), **kw)
class TestSegmentation:
    codes = ['empty','light','dark']
    def dls(self, size=16, codes=None, **kw):
        codes = codes or self.codes
        def y(i):
            m = np.asarray(mask(i, size))
            return PILMask.create(np.where(m==VOID, VOID, np.array([codes.index(k) for k in self.codes])[np.minimum(m, 2)]).astype(np.uint8))
        return dls_of((ImageBlock,MaskBlock(codes)), y, partial(image, size=size), **kw)
    def learner(self, dls, model, **kw): return learner(dls, model, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), **kw)
    def formula(self, s, t, y): return .5*ce(s, y, ignore_index=VOID)+.5*kl(s, t)[y!=VOID].mean()

    def test_unet(self):
        "The void counts for neither loss"
        learn = self.learner(self.dls(), unet())
        steps = check(learn, unet((8,16), seed=1), self.formula)
        assert all((o.y[0]==VOID).any() for o in steps) and isinstance(learn.model, DynamicUnet)
    def test_no_void(self):
        "fastai's own loss for masks"
        dls = dls_of((ImageBlock,MaskBlock(self.codes)), lambda i: PILMask.create((np.asarray(mask(i))%VOID).astype(np.uint8)))
        learn = learner(dls, unet())
        assert learn.loss_func.axis==1
        check(learn, unet((8,16), seed=1), lambda s,t,y: .3*ce(s, y)+.7*kl(s, t, 2.).mean(), T=2., alpha=.7)
    def test_augmented(self):
        "Mask, image and the teacher's map are turned together"
        check(self.learner(self.dls(batch_tfms=[Rotate(20., p=1.),Flip(),Normalize.from_stats(*imagenet_stats)]), unet()), unet((8,16), seed=1), self.formula)
    def test_learner_as_teacher(self):
        "Codes in another order, and one more"
        t = warm(self.learner(self.dls(codes=['dark','empty','stain','light']), unet((8,16), c=4, seed=1)))
        check(self.learner(self.dls(), unet()), t, self.formula, lambda x: ask(t.model, x)[:,[1,3,0]])
    def test_exported(self, tmp_path):
        "A U-Net keeps hooks on its encoder, which files and copies take along"
        learn = self.learner(self.dls(), unet((8,16), seed=1), path=tmp_path)
        learn.export('t.pkl')
        s = self.learner(self.dls(), unet(), path=tmp_path)
        s.add_cb(KD(tmp_path/'t.pkl'))
        fit(s)
        s.export('s.pkl')
        loaded = load_learner(tmp_path/'s.pkl')
        x = s.dls.valid.one_batch()[0].as_subclass(Tensor)
        assert torch.equal(ask(s.model, x), ask(loaded.model, x)) and torch.equal(ask(deepcopy(s.model), x), ask(s.model, x))
    def test_unet_learner(self):
        "As most people build it"
        dls = self.dls(n=8, bs=4)
        set_seed(0, reproducible=True)
        learn = unet_learner(dls, torchvision.models.resnet18, pretrained=False, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), n_out=3)
        check(learn, unet((8,16), seed=1), self.formula)
        check(self.learner(dls, unet()), learn, self.formula)
    def test_torchvision(self):
        "A dict of maps"
        set_seed(0)
        t = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        check(self.learner(self.dls(n=16, bs=8), unet()), t, self.formula, lambda x: t.eval()(x)['out'].detach())
    def test_ensemble(self):
        a,b = unet((8,16), seed=1),cnn(3, (8,), seed=2, dense=True)
        def says(x): return (.5*ask(a, x).double().softmax(1)+.5*ask(b, x).double().softmax(1)).log()
        check(self.learner(self.dls(), unet()), [a,b], self.formula, says)
    def test_feature_term(self):
        "A layer of both U-Nets, beside the hooks they keep on their encoders"
        s,t = unet(),unet((8,16), seed=1)
        learn,n = self.learner(self.dls(), s),lambda m: [len(o._forward_hooks) for o in m.modules()]
        was,seen,spy = (n(s),n(t)),[],Spy()
        class Before(Callback):
            run_valid = False
            def before_batch(self): seen.append(weights(self.learn.model))
        fit(learn, cbs=[KD(t, terms=Term('at', 'layers.4', 'layers.4'), alpha=0., task_weight=0.),spy,Before()])
        assert (n(s),n(t))==was
        def attention(m, x):
            with hook_output(m.layers[4]) as h, torch.no_grad(): m(x)
            return F.normalize(h.stored.double().pow(2).mean(1).flatten(1))
        m = unet()
        for o,w in zip(spy.steps, seen, strict=True):
            m.load_state_dict(w)
            want = (attention(m.train(), o.x[0])-attention(t.eval(), o.x[0])).norm(dim=1).mean()
            torch.testing.assert_close(torch.tensor(o.loss), want.float(), rtol=1e-4, atol=1e-5)
    def test_interrupted(self):
        class Stop(Callback):
            def after_step(self): raise KeyboardInterrupt
        learn,t = self.learner(self.dls(), unet()),unet((8,16), seed=1)
        n = lambda m: [len(o._forward_hooks) for o in m.modules()]
        was = n(learn.model),n(t)
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[KD(t),Stop()])
        assert (n(learn.model),n(t))==was
        check(learn, t, self.formula)

class TestResolution:
    "A teacher that answers at another height and width"
    dls,learner,formula,codes = TestSegmentation.dls,TestSegmentation.learner,TestSegmentation.formula,TestSegmentation.codes
    def test_same_size(self):
        "A fully convolutional teacher takes the student's size as it is"
        t = warm(self.learner(self.dls(32), unet((8,16), size=32, seed=1)))
        check(self.learner(self.dls(), unet()), t, self.formula)
    def test_larger_input(self):
        up,down = partial(F.interpolate, size=(32,32), mode='bilinear', antialias=True),partial(F.interpolate, size=(16,16), mode='bilinear', antialias=True)
        t = unet((8,16), size=32, seed=1)
        check(self.learner(self.dls(), unet()), Teacher(t, size=32, output=down), self.formula, lambda x: down(ask(t, up(x))))
    def test_coarse_answer(self):
        "A map of a quarter of the image"
        t,up = encoder((8,16,3), seed=1),partial(F.interpolate, size=(16,16), mode='bilinear')
        check(self.learner(self.dls(), unet()), Teacher(t, output=up), self.formula, lambda x: up(ask(t, x)))
    def test_refused(self):
        learn = self.learner(self.dls(), unet())
        was = weights(learn.model)
        with pytest.raises(ValueError, match=r'\(16, 3, 16, 16\).*\(16, 3, 4, 4\).*Teacher\(output='): fit(learn, cbs=KD(encoder((8,16,3))))
        assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())

# -- several inputs
class Pair(nn.Module):
    "Two images through one body"
    def __init__(self, c=2, widths=(4,8), seed=0):
        super().__init__()
        self.body,self.head = cnn(8, widths, seed=seed),nn.Linear(16, c)
    def forward(self, a, b): return self.head(torch.cat([self.body(a),self.body(b)], 1))
class WithTable(nn.Module):
    "An image and a row of numbers, in either order"
    def __init__(self, c=10, widths=(4,8), seed=0, first=True):
        super().__init__()
        self.first,self.body,self.head = first,cnn(8, widths, seed=seed),nn.Linear(11, c)
    def forward(self, a, b):
        img,row = (a,b) if self.first else (b,a)
        return self.head(torch.cat([self.body(img),row], 1))
class TestInputs:
    norm = Normalize.from_stats([.5]*3, [.25]*3)
    def pairs(self, **kw):
        return dls_of((ImageBlock,ImageBlock,CategoryBlock(vocab=['same','other'], sort=False)),
            lambda i: 'same' if scans.target[i]==scans.target[i//2] else 'other', [image,lambda i: image(i//2)], n_inp=2, **kw)
    def table(self, first=True, **kw):
        blocks,gets = [ImageBlock,TransformBlock],[image,lambda i: tensor(*center(i),scans.images[i].mean()/16).float()]
        if not first: blocks,gets = blocks[::-1],gets[::-1]
        return dls_of((*blocks,CategoryBlock(vocab=[str(i) for i in range(10)], sort=False)), digit, gets, n_inp=2, **kw)
    formula = staticmethod(half_kd)
    def test_two_images(self): check(learner(self.pairs(batch_tfms=[*aug_transforms(),self.norm]), Pair()), Pair(2, (8,16), seed=1), self.formula)
    def test_two_images_in_another_normalisation(self):
        "Each of the two"
        t = warm(learner(self.pairs(batch_tfms=Normalize.from_stats(*imagenet_stats)), Pair(2, (8,16), seed=1)))
        m,s = [tensor(o)[:,None,None] for o in imagenet_stats]
        check(learner(self.pairs(), Pair()), t, self.formula, lambda a,b: ask(t.model, (a-m)/s, (b-m)/s))
    def test_two_images_in_another_size(self):
        t,up = Pair(2, (8,16), seed=1),partial(F.interpolate, size=(24,24), mode='bilinear', antialias=True)
        check(learner(self.pairs(), Pair()), Teacher(t, size=24), self.formula, lambda a,b: ask(t, up(a), up(b)))
    @pytest.mark.parametrize('first', [True,False])
    def test_image_and_table(self, first):
        check(learner(self.table(first), WithTable(first=first)), WithTable(10, (8,16), seed=1, first=first), self.formula)
    @pytest.mark.parametrize('first', [True,False])
    def test_image_and_table_in_another_normalisation(self, first):
        "The numbers of the table stay as they are"
        t = warm(learner(self.table(first, batch_tfms=Normalize.from_stats(*imagenet_stats)), WithTable(10, (8,16), seed=1, first=first)))
        m,s = [tensor(o)[:,None,None] for o in imagenet_stats]
        norm = lambda x: (x-m)/s if x.ndim==4 else x
        check(learner(self.table(first), WithTable(first=first)), t, self.formula, lambda a,b: ask(t.model, norm(a), norm(b)))
    def test_teacher_of_the_image_alone(self):
        dls,t = self.table(),cnn(10, (8,16), seed=1)
        with pytest.raises(ValueError, match=r"cannot run on the student's inputs \[\(16, 3, 16, 16\), \(16, 3\)\].*\n.*input_tfm="):
            fit(learner(dls, WithTable()), cbs=KD(t))
        check(learner(dls, WithTable()), Teacher(t, input_tfm=lambda img,row: img), self.formula, lambda img,row: ask(t, img))
    def test_student_of_the_image_alone(self):
        "What only the teacher reads: the student leaves it out"
        class Image1(nn.Module):
            def __init__(self): super().__init__(); self.m = cnn(10)
            def forward(self, img, row): return self.m(img)
        check(learner(self.table(), Image1), WithTable(10, (8,16), seed=1), self.formula)
    def test_mixed_ensemble(self):
        a,b,dls = WithTable(10, (8,16), seed=1),cnn(10, (8,), seed=2),self.table()
        def says(img, row): return torch.log(.5*ask(a, img, row).double().softmax(1)+.5*ask(b, img).double().softmax(1))
        check(learner(dls, WithTable()), [a,Teacher(b, input_tfm=lambda img,row: img)], self.formula, says)

# -- models of others
class TestModels:
    blocks = TestSingleLabel.blocks
    def dls(self, size=16, mode='RGB', **kw):
        return dls_of((ImageBlock(PILImageBW if mode=='L' else PILImage),self.blocks[1]), digit, partial(image, size=size, mode='RGB'), **kw)
    formula = staticmethod(half_kd)
    def resnet(self, seed=0): set_seed(seed, reproducible=True); return torchvision.models.resnet18(weights=None, num_classes=10)
    def test_torchvision_teacher(self): check(learner(self.dls(), cnn(10)), self.resnet(), self.formula)
    def test_torchvision_student(self): check(learner(self.dls(), self.resnet), cnn(10, (8,16), seed=1), self.formula)
    def test_vision_learner(self):
        set_seed(0, reproducible=True)
        learn = vision_learner(self.dls(), torchvision.models.resnet18, pretrained=False, normalize=False)
        check(learn, cnn(10, (8,16), seed=1), self.formula)
    def test_thousand_classes(self):
        "A net of ImageNet's size of answer has classes of its own"
        with pytest.raises(ValueError, match='answers with 1000 classes, the student\'s data have 10.*vocab='):
            fit(learner(self.dls(), cnn(10)), cbs=KD(torchvision.models.shufflenet_v2_x0_5(weights=None)))
        t = torchvision.models.shufflenet_v2_x0_5(weights=None)
        names = [f'thing {i}' for i in range(990)]+[str(i) for i in reversed(range(10))]
        check(learner(self.dls(), cnn(10)), Teacher(t, vocab=names), self.formula, lambda x: ask(t, x)[:,range(999,989,-1)])
    def test_timm(self):
        timm = pytest.importorskip('timm')
        t = timm.create_model('test_resnet', pretrained=False, num_classes=10)
        check(learner(self.dls(32), cnn(10)), t, self.formula)
        # its own normalisation stands in its configuration
        m,s = [tensor(t.default_cfg[k])[:,None,None] for k in ('mean','std')]
        check(learner(self.dls(32), cnn(10)), Teacher(t, stats=(t.default_cfg['mean'],t.default_cfg['std'])), self.formula, lambda x: ask(t, (x-m)/s))
        v = timm.create_model('test_vit', pretrained=False, num_classes=10)
        check(learner(self.dls(32), cnn(10)), Teacher(v, size=160), self.formula, lambda x: ask(v, F.interpolate(x, 160, mode='bilinear', antialias=True)))
    def test_timm_student(self):
        pytest.importorskip('timm')
        set_seed(0, reproducible=True)
        check(vision_learner(self.dls(32), 'test_resnet', pretrained=False, normalize=False), cnn(10, (8,16), seed=1), self.formula)
    def test_mixed_ensemble(self, tmp_path):
        "A Learner of other classes and normalisation, a module, an exported Learner, torchvision"
        vocab = [str(i) for i in reversed(range(10))]
        dls = dls_of((ImageBlock,CategoryBlock(vocab=vocab, sort=False)), digit, batch_tfms=Normalize.from_stats(*imagenet_stats))
        a,b,d = warm(learner(dls, cnn(10, (8,16), seed=1))),cnn(10, (8,), seed=2),self.resnet(3)
        c = warm(learner(self.dls(), cnn(10, (4,16), seed=4), path=tmp_path))
        c.export('c.pkl')
        m,s = [tensor(o)[:,None,None] for o in imagenet_stats]
        def says(x): return sum(o.double().softmax(1)/4 for o in (ask(a.model, (x-m)/s).flip(1),ask(b, x),ask(c.model, x),ask(d, x))).log()
        check(learner(self.dls(), cnn(10)), Ensemble([a,b,tmp_path/'c.pkl',d]), self.formula, says)
