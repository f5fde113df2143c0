"Replayed augmentation: the same x whatever the batch, the order, the workers; good numbers; nothing leaks"
import hashlib,random
import numpy as np,pytest,torch,torch.multiprocessing as mp
from functools import lru_cache
from fastai.vision.all import *
from fastcore.test import *
from scipy import stats
from sklearn.datasets import load_digits,load_sample_images
from fastkd.targets.draws import *
from fastkd.targets.replay import *

# fastcore's helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

@lru_cache
def photos():
    ims = load_sample_images().images
    return [PILImage.create(ims[i%2][10*i:10*i+150, 14*i:14*i+200]) for i in range(12)]
@lru_cache
def digits(): return [PILImage.create(np.stack([np.kron(o/16*255, np.ones((4,5)))]*3, -1).astype(np.uint8)) for o in load_digits().images[:60]]
def get_image(i): return (photos()+digits())[i]
def get_key(i): return tensor(i)
N = 72

class After:
    "Batch transforms under replay; the key of an item is its y"
    def __init__(self, dl, f): self.dl,self.f = dl,f
    def __call__(self, b):
        self.f.split_idx = self.dl.dataset.split_idx
        with replay_batch([item_seed(3, self.dl.view, k) for k in b[1].tolist()], self.dl.device) as st: res = self.f(b)
        self.dl.noted += st.batch_draws
        return res

class ReplayDL(TfmdDL):
    view = 0
    def do_item(self, s):
        with replay_item(item_seed(3, self.view, ifnone(s, 0))): return super().do_item(s)
    def __iter__(self):
        f,self.noted = self.after_batch,[]
        self.after_batch = After(self, f)
        try: yield from super().__iter__()
        finally: self.after_batch = f

def tfms(name):
    light = [Saturation(), Hue(), Normalize.from_stats(*imagenet_stats, cuda=False)]
    return {'none':    (Resize(32, 'squish'), []),
            'aug':     (RandomResizedCrop(32, min_scale=.3), [*aug_transforms(max_lighting=.4), *light]),
            'dihedral':(RandomCrop(32), aug_transforms(flip_vert=True, min_zoom=.7, max_zoom=1.5)),
            'presize': (Resize(72), aug_transforms(size=32, max_zoom=1.6)),
            'odd':     (RandomResizedCrop(27), [*aug_transforms(), *light]),
            'erase':   (Resize(32), [*aug_transforms(batch=True), RandomErasing(p=.9)])}[name]

def loader(name, view=0, cls=ReplayDL, bs=7, shuffle=False, num_workers=0):
    item,batch = tfms(name)
    ds = Datasets(range(N), [[get_image],[get_key]], splits=[list(range(N)),[0]])
    dl = cls(ds.train, bs=bs, shuffle=shuffle, num_workers=num_workers, after_item=[item, ToTensor()], after_batch=[IntToFloatTensor(), *batch])
    dl.view = view
    return dl

def xs(dl):
    "Each item's x by its key"
    return {k:x.as_subclass(Tensor) for b in dl for x,k in zip(b[0], b[1].tolist())}
@lru_cache
def ref(name, view=0): return xs(loader(name, view))
def n_same(a, b): return sum(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('name', ['aug','dihedral','presize'])
@pytest.mark.parametrize('bs', [1,7,64])
def test_any_batch_and_order(name, bs):
    "Bit for bit, where height times width is a multiple of 16"
    for shuffle in (False,True):
        x = xs(loader(name, bs=bs, shuffle=shuffle))
        assert len(x)==N and n_same(ref(name), x)==N

@pytest.mark.parametrize('method', ['fork','spawn'])
def test_workers(method):
    was = mp.get_start_method()
    try:
        mp.set_start_method(method, force=True)
        assert n_same(ref('aug'), xs(loader('aug', bs=10, shuffle=True, num_workers=2)))==N
    finally: mp.set_start_method(was, force=True)

def test_odd_size():
    "The last pixels of a row may be rounded otherwise in another batch"
    a,b = ref('odd'),xs(loader('odd', bs=64))
    assert max((a[k]-b[k]).abs().max().item() for k in a)<=5e-6 # of values up to 2.6

def test_views_and_items_differ():
    a,b = ref('aug'),ref('aug', 1)
    assert n_same(a, b)==0
    assert n_same(xs(loader('aug', cls=TfmdDL)), a)==0
    # one picture under many keys
    its = Pipeline([RandomResizedCrop(16), ToTensor()], split_idx=0)
    def crop(k):
        with replay_item(item_seed(0, 0, k)): return its(photos()[0])
    assert len({crop(k).numpy().tobytes() for k in range(200)})==200

def test_batch_draws():
    dl = loader('erase', bs=24)
    a,b = xs(dl),xs(dl)
    assert set(dl.noted)=={'random'} and n_same(a, b)==N
    assert n_same(a, xs(loader('erase', bs=7)))<N/2
    assert [o.split()[0] for o in batch_level(loader('erase', cls=TfmdDL))]==['Flip+Rotate+Zoom+Warp','Brightness+Contrast','RandomErasing']

def test_student_is_untouched():
    "A replayed pass leaves all generators where a pass without random transforms leaves them, looking leaves them as they were"
    def then(replay):
        set_seed(0)
        np.random.randn(); random.gauss(0, 1)
        dl = loader('aug', cls=TfmdDL, shuffle=True)
        xs(loader('aug') if replay else loader('none', cls=TfmdDL))
        if replay: is_random(dl); not_replayed(dl); batch_level(dl)
        res = xs(dl)
        return list(res),res,np.random.randn(3).tolist(),random.gauss(0, 1),torch.rand(3).tolist()
    a,b = then(False),then(True)
    assert n_same(a[1], b[1])==N and a[0]==b[0] and a[2:]==b[2:]

seeds = [item_seed(0, 0, k) for k in range(2000)]
def drawn(f, times=10):
    "`(items, draws)` of `f(n)`"
    with replay_batch(seeds) as st: res = [f(len(seeds)) for _ in range(times)]
    assert not st.batch_draws
    return torch.stack([o.as_subclass(Tensor) for o in res], 1).double().reshape(len(seeds), -1).numpy()

x = TensorImage(torch.zeros(2000,1))
@pytest.mark.parametrize('f,cdf', [
    (lambda n: x.new_empty(n).uniform_(-2, 3), stats.uniform(-2, 5)), (lambda n: torch.rand(n), stats.uniform()), (lambda n: torch.rand((n,3), dtype=torch.float64), stats.uniform()),
    (lambda n: torch.rand_like(x), stats.uniform()), (lambda n: x.new_empty(n,2).normal_(1, 2), stats.norm(1, 2)), (lambda n: torch.randn(n,300), stats.norm()),
    (lambda n: torch.randn_like(x), stats.norm()), (lambda n: torch.rand(n,300), stats.uniform()), (lambda n: x.new_empty(n).uniform_(**{'from':1, 'to':2}), stats.uniform(1, 1))])
def test_continuous(f, cdf):
    u = drawn(f, 3 if f(2000).numel()>1e5 else 10)
    m = u.size
    assert abs(u.mean()-cdf.mean())<5*cdf.std()/m**.5 and abs(u.var()/cdf.var()-1)<8/m**.5
    assert stats.kstest(u.ravel()[:100000], cdf.cdf).pvalue>1e-3
    r = np.corrcoef(u[:,:20].T)[np.triu_indices(min(20, u.shape[1]), 1)]
    assert abs(r).max()<5/len(u)**.5, 'draws are correlated'
    items = np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0,1]
    assert abs(items)<5/m**.5, 'neighbours are correlated'

@pytest.mark.parametrize('f,p', [(lambda n: x.new_empty(n).bernoulli_(.3), .3), (lambda n: torch.bernoulli(torch.full((n,2), .8)), .8), (lambda n: torch.empty(n).bernoulli_(), .5),
    (lambda n: torch.full((n,), .1).bernoulli(), .1), (lambda n: torch.empty(n,300).bernoulli_(.6), .6), (lambda n: torch.full((n,), .1).bernoulli(p=.7), .7), (lambda n: torch.empty(n).bernoulli_(torch.tensor(.2)), .2)])
def test_bernoulli(f, p):
    u = drawn(f)
    assert set(np.unique(u))=={0.,1.} and abs(u.mean()-p)<5*(p*(1-p)/u.size)**.5
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0,1])<5/u.size**.5

@pytest.mark.parametrize('f,lo,hi', [(lambda n: torch.randint(0, 8, (n,)), 0, 8), (lambda n: torch.randint(5, (n,2)), 0, 5), (lambda n: torch.randint(low=-3, high=4, size=(n,)), -3, 4),
    (lambda n: torch.randint_like(torch.zeros(n, dtype=torch.long), 6), 0, 6), (lambda n: torch.randint_like(torch.zeros(n), 2, 6), 2, 6), (lambda n: torch.empty(n).random_(3), 0, 3), (lambda n: torch.randint(high=7, size=(n,)), 0, 7)])
def test_integers(f, lo, hi):
    u = drawn(f)
    vals,n = np.unique(u, return_counts=True)
    assert vals.tolist()==list(range(lo, hi)) and stats.chisquare(n).pvalue>1e-3

def test_all_draws_by_item():
    "Any draw of any size is the item's own: order and size of the batch do not matter"
    fs = [lambda n: torch.rand(n), lambda n: torch.rand(n, 2, 3), lambda n: torch.randn(n, 20, 20), lambda n: torch.empty(n, 3, 200).bernoulli_(.5), lambda n: torch.randint(0, 1<<40, (n,)),
        lambda n: torch.empty(n, 30, 30, dtype=torch.half).uniform_(), lambda n: torch.empty(n, dtype=torch.bfloat16).normal_(), lambda n: torch.empty(2, n).T.uniform_(2, 3), lambda n: torch.rand(size=(n,0))]
    def draw(ss):
        with replay_batch(ss) as st: return [f(len(ss)) for f in fs],st.batch_draws
    ss,o = seeds[:50],np.random.RandomState(0).permutation(50)[:11]
    (a,an),(b,bn) = draw(ss),draw([ss[i] for i in o])
    assert an==bn==[]
    for p,q in zip(a, b): assert p.dtype==q.dtype and torch.equal(p[torch.tensor(o)], q)

def test_low_precision_stays_below_its_limit():
    for t in (torch.half,torch.bfloat16,torch.float,torch.double):
        u = drawn(lambda n: torch.rand(n, 10, dtype=t))
        assert 0<=u.min() and u.max()<1

def test_streams_never_change():
    "What was recorded yesterday is drawn tomorrow: published values of SplitMix64, and our own hash written out"
    assert BatchStreams([1234567]).bits(5)[0].tolist()==[6457827717110365317,3203168211198807973,9817491932198370423,4593380528125082431,16408922859458223821]
    h = hashlib.blake2b(b''.join(o.to_bytes(8, 'little') for o in (1,2,2**64-1)), digest_size=8).digest()
    assert item_seed(1, 2, 2**64-1)==item_seed(1, 2, np.uint64(2**64-1))==int.from_bytes(h, 'little')

def test_refused():
    for bad in (-1, 2**64, 1.5, 'a', None):
        with pytest.raises(ValueError): item_seed(0, 0, bad)
        with pytest.raises(ValueError): replay_item(bad)
    for bad in ([-1], [2**64], ['a'], 5, None):
        with pytest.raises(ValueError),replay_batch(bad): pass

def test_own_generator_is_respected():
    g = lambda: torch.Generator().manual_seed(1)
    with replay_batch(seeds[:4]) as st: a = [torch.rand(4, generator=g()), torch.empty(4).uniform_(generator=g()), torch.bernoulli(torch.full((4,), .5), generator=g())]
    for o,p in zip(a, [torch.rand(4, generator=g()), torch.empty(4).uniform_(generator=g()), torch.bernoulli(torch.full((4,), .5), generator=g())]): assert torch.equal(o, p)
    assert st.batch_draws==[]

def test_other_shapes_are_noted():
    with replay_batch([1,2,3]) as st: torch.rand(()), torch.randn(2), torch.empty(4).normal_(), F.dropout(torch.ones(3)), random.random(), torch.empty(3).random_()
    assert st.batch_draws==['torch.rand','torch.randn','Tensor.normal_','Tensor.random_','random']
    with replay_batch([1,2,3]) as st: F.dropout(torch.ones(3))
    assert st.batch_draws==['torch']

def test_nothing_stays_patched():
    def now(): return {k:vars(o).get(k) for o,ks in ((Tensor,('uniform_','normal_','bernoulli_','random_','bernoulli')),(torch,('rand','randn','randint','rand_like','bernoulli'))) for k in ks}
    was = now()
    with pytest.raises(KeyError),replay_batch([1,2]): raise KeyError
    with replay_batch([1]),replay_batch([2]): torch.rand(1)
    assert now()==was

class Own(Transform):
    "As wrappers of other libraries do"
    order = 1
    def __init__(self): self.rng = np.random.default_rng(); super().__init__()
    def encodes(self, x:PILImage): return PILImage.create((np.array(x)*self.rng.uniform(.5, 1)).astype(np.uint8))
def rarely(x:PILImage): return x if random.random()>1e-6 else PILImage.create(np.zeros((9,9,3), np.uint8))
def random_pick(i): return digits()[i] if random.random()<.5 else digits()[0]
def dls(item, batch=None, get_x=get_image):
    ds = DataBlock((ImageBlock,CategoryBlock), get_x=get_x, get_y=lambda i: i%3, item_tfms=item, batch_tfms=batch, splitter=RandomSplitter(seed=0))
    return ds.dataloaders(range(40), bs=8, num_workers=0)
class Center(Transform):
    order = 110
    def encodes(self, x:TensorImage): return x-x.mean()
class RandomData:
    def __len__(self): return 20
    def __getitem__(self, i): return torch.rand(3),i

squish = Resize(16, 'squish')
@pytest.mark.parametrize('args,rand,valid,lost,batch', [
    ((squish,), [], [], [], []),
    ((squish, [Rotate(draw=30, p=1.), Normalize.from_stats(*imagenet_stats, cuda=False)]), [], [], [], []),
    ((squish, aug_transforms(p_affine=0, p_lighting=0, do_flip=False)), [], [], [], []),
    ((Resize(16),), ['Resize'], [], [], []),
    ((RandomResizedCrop(16), aug_transforms()), ['RandomResizedCrop','Flip+Rotate+Zoom+Warp','Brightness+Contrast'], [], [], []),
    (([Own(),squish],), ['Own'], ['Own'], ['Own'], []),
    (([rarely,squish],), ['rarely'], ['rarely'], [], []),
    ((squish, None, random_pick), ['random_pick'], ['random_pick'], [], []),
    ((squish, [RandomErasing(p=.01)]), ['RandomErasing'], [], [], ['RandomErasing (random)']),
    ((Resize(32, 'squish'), [RandomResizedCropGPU(16)]), ['RandomResizedCropGPU'], [], [], ['RandomResizedCropGPU (random)']),
    ((squish, [DeterministicFlip()]), ['DeterministicFlip'], [], ['DeterministicFlip'], []),
    ((squish, [Center()]), [], [], [], ['Center (depends on the other items)'])])
def test_detection(args, rand, valid, lost, batch):
    d = dls(*args)
    for _ in range(2):
        # the validation set first: fastai's transforms remember what they last saw
        assert is_random(d.valid)==valid and is_random(d.train)==rand
    assert not_replayed(d.train)==lost and batch_level(d.train)==batch
    fs = d.train.after_batch.fs
    d.train.one_batch()
    assert d.train.after_batch.fs is fs

def test_other_loaders():
    assert is_random(DataLoader(RandomData(), bs=4))==['DataLoader of RandomData'] and not not_replayed(DataLoader(RandomData(), bs=4))
    with pytest.raises(TypeError, match='dls.train'): is_random(torch.utils.data.DataLoader(RandomData()))
