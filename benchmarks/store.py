"""What do stored targets cost? Each form beside its limit, timed in turns in one run.

    python benchmarks/store.py                       # all parts, a quarter of an hour on one core
    python benchmarks/store.py --parts gather,step

`gather`: 64 rows of 1000 float16 logits from a store against `index_select` from a tensor in memory. `step`: a fastai step with a store, and with a cache that is filled,
against the same step without distillation. `precompute`: `precompute_targets` against the bare teacher over the same DataLoader. `replay`: a pass over augmented items with
replay against one without. `cache`: ten epochs with `cache` against ten plain epochs and one pass of the teacher. `bytes`: what an item takes on disk, by kind.

Forms in random order, medians, brackets are 95% bootstrap intervals of the ratio over rounds."""
import tempfile
from sklearn.datasets import load_sample_images
from timing import *

def random_store(d, n, c, after=noop, **spec):
    "A store of random logits under the keys of the numbers 0 to n-1, and its keys; `after` is called after each chunk of 4096"
    spec = {**dict(kind='dense', shape=[c], task='softmax', axis=0, T=None, k=16, tail='sample', dtype='float16'), **spec}
    store,keys = TargetStore.create(d, make_manifest(spec)),np.array([item_key(i) for i in range(n)], np.uint64)
    z = torch.randn(4096, c)*3
    with TargetWriter(store, keys) as w:
        for i in range(0, n, 4096):
            w.put(keys[i:i+4096], z[:min(4096, n-i)].roll(i, 1))
            after()
    return store,keys

def gather(d, n):
    store,keys = random_store(d/'gather', 20_000, 1000)
    rows,ram = store.warm().rows(keys),torch.from_numpy(store.fields(store.rows(keys))['logits'])
    rng = np.random.default_rng(0)
    forms = dict(memory=lambda i: ram.index_select(0, torch.from_numpy(i)), store=lambda i: store.fields(rows[i]))
    return race('gather', list(forms), in_turns(forms, 3*n, args=lambda _: (rng.integers(0, len(keys), 64),), reps=20), [0], 1.5)

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
    "A step with stored or cached answers against a plain one, each on the next batch of its own DataLoader: all between two batches counts, reading and looking up included"
    store = precompute_targets(teacher, dls, d/f'store_{name}', bar=noop)
    cached = KnowledgeDistillation(teacher, cache=d/f'cache_{name}')
    learns = [learner(dls, student, cbs) for cbs in (None,KnowledgeDistillation(store),cached)]
    with learns[2].no_bar(), learns[2].no_logging(): learns[2].fit(1, 0.)
    def _forever(dl):
        while True: yield from dl
    def _run():
        its,k = [_forever(l.dl) for l in learns],itertools.count()
        forms = [lambda l=l,it=it: l.one_batch(next(k), next(it)) for l,it in zip(learns, its)]
        t,names = in_turns(forms, n, 5),['plain','stored','cached']
        res.update(race(f'step {name}', names, t, [0], target, own=1), cached=race(f'step {name}', names, t, [0], target))
    res = {}
    inside_fits(learns, 3*n+50, _run)
    return res

def step(d, n):
    dls = digits_dls(bs=64)
    res = dict(digits=one_step(d, 'digits', dls, tiny_cnn((4,8,16)), tiny_cnn((32,64,128)), 10*n, 1.15))
    dls = image_dls(images(d/'photos', 640, 64), 64, 16)
    return {**res, 'resnet':one_step(d, 'resnet', dls, resnet18(num_classes=10), resnet34(num_classes=10), n, 1.03)}

def precompute(d, n):
    dls = image_dls(images(d/'pre', 2560, 64), 64, 32)
    dls = DataLoaders(dls.valid.new(dls.train.dataset), dls.valid, path=dls.path)
    teacher,k = resnet34(num_classes=10).eval(),itertools.count()
    @torch.no_grad()
    def bare():
        for dl in dls.loaders:
            for b in dl: teacher(b[0].as_subclass(Tensor))
    forms = dict(bare=bare, precompute=lambda: precompute_targets(teacher, dls, d/f'pre_store{next(k)}', bar=noop))
    return race('precompute', list(forms), in_turns(forms, max(n//10, 3), 1), [0], 1.05)

def replay(d, n):
    "A pass over augmented photographs: decoded, cropped at random and resized, then turned, zoomed and lit in batches"
    dls = image_dls(images(d/'replay', 256, 224), 128, 32, RandomResizedCrop(128, min_scale=.35), aug_transforms(size=128))
    dl,seeded = dls.train,track(dls.train, root=dls.path, seed=1)
    forms = dict(plain=lambda: [None for _ in dl], replayed=lambda: [None for _ in seeded])
    return race('replay', list(forms), in_turns(forms, max(n//3, 5), 1), [0], 1.10)

def cache(d, n, epochs=10):
    dls = image_dls(images(d/'cache', 160, 64), 64, 16)
    student,teacher,k = resnet18(num_classes=10),resnet34(num_classes=10).eval(),itertools.count()
    def fit(cbs=None):
        learn = learner(dls, student, cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-4)
    @torch.no_grad()
    def ask():
        for b in dls.train: teacher(b[0].as_subclass(Tensor))
    forms = dict(plain=fit, teacher=ask, cached=lambda: fit(KnowledgeDistillation(teacher, cache=d/f'cache{next(k)}')))
    return race(f"cache, {epochs} epochs", list(forms), in_turns(forms, max(n//12, 3), 0), [0,1], 1.06)

def bytes_(d, n, items=4096):
    "On disk, of answers in 10 and in 1000 classes; 4 bytes per number are what a tensor in memory takes"
    res = []
    for c in (10,1000):
        for kind,kw in dict(dense={}, dense8=dict(kind='dense8'), sparse=dict(kind='sparse', T=4.)).items():
            if kind=='sparse' and c==10: continue
            to = d/f'bytes{c}{kind}'
            random_store(to, items, c, **kw)
            res.append(dict(kind=kind, classes=c, bytes=sum(o.stat().st_size for o in to.rglob('*') if o.is_file())/items, raw=4*c))
            print('bytes per item'.ljust(18), res[-1], flush=True)
    return res

parts_ = dict(gather=gather, step=step, precompute=precompute, replay=replay, cache=cache, bytes=bytes_)

@call_parse
def main(
    n:int=60, # Rounds of the short forms; long ones take fewer
    parts:str=','.join(parts_), # Which, with commas
    out:str=str(here/'store.json') # Results
):
    "Time stored targets against their limits"
    set_seed(0)
    began,res = begin(),{}
    with tempfile.TemporaryDirectory() as d, fair():
        for k in parts.split(','): res[k] = parts_[k](Path(d), n)
    write(out, res, began)
