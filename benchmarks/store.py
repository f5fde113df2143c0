"""What do stored targets cost? Each form beside its limit, timed in turns in one run.

    python benchmarks/store.py                       # all parts, some minutes on one core
    python benchmarks/store.py --parts gather,step

`gather`: 64 rows of 1000 float16 logits from a store against `index_select` from a tensor in memory. `step`: a fastai step with a store against the same step
without distillation. `precompute`: `precompute_targets` against the bare teacher over the same DataLoader. `replay`: a pass over augmented items with replay against
one without. `cache`: ten epochs with `cache` against ten plain epochs and one pass of the teacher. `million`: a million items of 1000 classes in 'sparse' rows, written and
read, with the memory it takes.

One thread, wall time and CPU time of this process, forms in random order, medians, brackets are 95% bootstrap intervals of the ratio over rounds."""
import gc,json,resource,time,tempfile
from copy import deepcopy
from fastai.vision.all import *
from fastcore.script import call_parse
from sklearn.datasets import load_sample_images
from torchvision.models import resnet18,resnet34
from fastkd.all import *
from fastkd.test_utils import digits_dls,tiny_cnn
from step import inside_fits

def clocks(f):
    "Milliseconds of `f()`: wall, CPU time of this process"
    wall,cpu = time.perf_counter(),time.process_time()
    f()
    return [(time.perf_counter()-wall)*1e3,(time.process_time()-cpu)*1e3]

def rounds(forms, n, warmup=3):
    "Times `(n, forms, 2)`, the forms of a round in random order"
    rng,rows,names = random.Random(0),[],list(forms)
    for i in range(n+warmup):
        if i%10==0: gc.collect()
        t = {k:clocks(forms[k]) for k in rng.sample(names, len(names))}
        rows.append([t[k] for k in names])
    return np.array(rows[warmup:])

def ratio(t, own, *base, n_boot=2000):
    "Median of column `own` over the sum of the medians of `base`, with its interval, of times `(n,forms)`"
    def f(t): return np.median(t[...,own], -1)/sum(np.median(t[...,i], -1) for i in base)
    draws = f(t[np.random.default_rng(0).integers(len(t), size=(n_boot, len(t)))])
    return float(f(t)),*np.percentile(draws, [2.5,97.5]).tolist()

def report(name, names, t, base, target):
    "Print one line per clock; what goes into the file"
    res = dict(forms={k:dict(zip(('wall','cpu'), np.median(t[:,i], 0).round(4).tolist())) for i,k in enumerate(names)}, target=target)
    for c,clock in enumerate(('wall','cpu')):
        r,lo,hi = res[clock] = ratio(t[...,c], len(names)-1, *base)
        print(f"{name:20} {clock:5} {'  '.join(f'{k} {np.median(t[:,i,c]):9.3f} ms' for i,k in enumerate(names))}   ratio {r:.3f} ({lo:.3f}-{hi:.3f}), target {target}", flush=True)
    return res

def random_store(d, n, c, **spec):
    "A store of random logits under the keys of the numbers 0 to n-1"
    spec = {**dict(kind='dense', shape=[c], task='softmax', axis=0, T=None, k=16, tail='sample', dtype='float16'), **spec}
    store,keys = TargetStore.create(d, make_manifest(spec)),np.array([item_key(i) for i in range(n)], np.uint64)
    z = torch.randn(4096, c)*3
    with TargetWriter(store, keys) as w:
        for i in range(0, n, 4096): w.put(keys[i:i+4096], z[:min(4096, n-i)].roll(i, 1))
    return store,keys

def gather(d, n):
    store,keys = random_store(d/'gather', 20_000, 1000)
    rows,ram = store.warm().rows(keys),torch.from_numpy(store.fields(store.rows(keys))['logits'])
    rng,now = np.random.default_rng(0),{}
    def draw(): now['i'] = rng.integers(0, len(keys), 64)
    forms = dict(ram=lambda: [ram.index_select(0, torch.from_numpy(now['i'])) for _ in range(20)],
        fields=lambda: [store.fields(rows[now['i']]) for _ in range(20)])
    rs = []
    for _ in range(n): draw(); rs.append(rounds(forms, 1, 0)[0])
    return report('gather x20', list(forms), np.array(rs), [0], 1.5)

def images(d, n, size):
    "Crops of two photographs as JPEG files, in ten folders"
    rng,photos = random.Random(0),load_sample_images().images
    for i in range(n):
        p,(h,w) = photos[i%2],photos[0].shape[:2]
        y,x = rng.randrange(h-size),rng.randrange(w-size)
        to = d/str(i%10)/f'{i}.jpg'
        to.parent.mkdir(parents=True, exist_ok=True)
        PILImage.create(p[y:y+size,x:x+size]).save(to, quality=90)
    return d

def image_dls(d, size, bs, item_tfms=None, batch_tfms=None):
    return ImageDataLoaders.from_folder(d, valid_pct=.2, seed=0, bs=bs, item_tfms=ifnone(item_tfms, Resize(size)), batch_tfms=batch_tfms, num_workers=0)

def one_step(d, name, dls, student, teacher, n, target):
    "A step with stored answers against a plain one, each on the next batch of its own DataLoader"
    store = precompute_targets(teacher, dls, d/f'store_{name}', bar=noop)
    learns = [Learner(dls, deepcopy(student), CrossEntropyLossFlat(), cbs=cbs) for cbs in (None, KnowledgeDistillation(store))]
    # the time of a step is all between two batches: reading, the step, and what is looked up for it
    def steps():
        its = [iter(_forever(l.dl)) for l in learns]
        return {k:partial(_one, l, it, itertools.count()) for k,l,it in zip(('plain','stored'), learns, its)}
    res = {}
    inside_fits(learns, n+30, lambda: res.update(t=rounds(steps(), n, 5)))
    return report(f'step {name}', ['plain','stored'], res['t'], [0], target)

def _forever(dl):
    while True: yield from dl
def _one(learn, it, i): learn.one_batch(next(i), next(it))

def step(d, n):
    dls = digits_dls(bs=64)
    res = dict(digits=one_step(d, 'digits', dls, tiny_cnn((4,8,16)), tiny_cnn((32,64,128)), 10*n, 1.15))
    dls = image_dls(images(d/'photos', 640, 64), 64, 16)
    return {**res, 'resnet':one_step(d, 'resnet', dls, resnet18(num_classes=10), resnet34(num_classes=10), n, 1.03)}

def precompute(d, n):
    dls = image_dls(images(d/'pre', 1280, 64), 64, 32)
    dls = DataLoaders(dls.valid.new(dls.train.dataset), dls.valid, path=dls.path)
    teacher,k = resnet34(num_classes=10).eval(),itertools.count()
    @torch.no_grad()
    def bare():
        for dl in dls.loaders:
            for b in dl: teacher(b[0].as_subclass(Tensor))
    forms = dict(bare=bare, precompute=lambda: precompute_targets(teacher, dls, d/f'pre_store{next(k)}', bar=noop))
    return report('precompute', list(forms), rounds(forms, 5, 1), [0], 1.05)

def replay(d, n):
    "A pass over augmented photographs: decoded, cropped at random and resized, then turned, zoomed and lit in batches"
    dls = image_dls(images(d/'replay', 256, 224), 128, 32, RandomResizedCrop(128, min_scale=.35), aug_transforms(size=128))
    dl,seeded = dls.train,track(dls.train, root=dls.path, seed=1)
    forms = dict(plain=lambda: [None for _ in dl], replayed=lambda: [None for _ in seeded])
    return report('replay', list(forms), rounds(forms, max(n//4, 5), 1), [0], 1.10)

def cache(d, n, epochs=10):
    dls = image_dls(images(d/'cache', 320, 64), 64, 16)
    student,teacher,k = resnet18(num_classes=10),resnet34(num_classes=10).eval(),itertools.count()
    def fit(cbs=None):
        learn = Learner(dls, deepcopy(student), CrossEntropyLossFlat(), cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-4)
    @torch.no_grad()
    def ask():
        for b in dls.train: teacher(b[0].as_subclass(Tensor))
    forms = dict(plain=fit, teacher=ask, cached=lambda: fit(KnowledgeDistillation(teacher, cache=d/f'cache{next(k)}')))
    return report(f"cache, {epochs} epochs", list(forms), rounds(forms, 3, 0), [0,1], 1.06)

def million(d, n, items=1_000_000):
    "Write and read a million sparse rows; memory before, after"
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    before,t = peak(),time.perf_counter()
    store,keys = random_store(d/'million', items, 1000, kind='sparse', T=2.)
    write,t = time.perf_counter()-t,time.perf_counter()
    store = TargetStore(d/'million')
    rows = store.rows(keys)
    opened,t = time.perf_counter()-t,time.perf_counter()
    order = np.random.default_rng(0).permutation(items)
    for i in range(0, items, 4096): store.get(rows[order[i:i+4096]])
    res = dict(write_s=write, open_s=opened, read_s=time.perf_counter()-t, mb=sum(o.stat().st_size for o in (d/'million').rglob('*.npy'))/1e6, row_bytes=row_bytes(store.spec), peak_before_mb=before, peak_after_mb=peak())
    print('million'.ljust(20), {k:round(v, 1) for k,v in res.items()}, flush=True)
    return res

parts_ = dict(gather=gather, step=step, precompute=precompute, replay=replay, cache=cache, million=million)

@call_parse
def main(
    n:int=60, # Rounds of the short forms; long ones take fewer
    parts:str='gather,step,precompute,replay,cache,million', # Which, with commas
    out:str=str(Path(__file__).parent/'store.json') # Results
):
    "Time stored targets against their limits"
    torch.set_num_threads(1)
    set_seed(0)
    res = dict(torch=torch.__version__, load_before=os.getloadavg())
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        # untrained teachers are near chance
        warnings.filterwarnings('ignore', message='the stored answers were right|the teacher is right on')
        for k in parts.split(','): res[k] = parts_[k](Path(d), n)
    res['load_after'] = os.getloadavg()
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
