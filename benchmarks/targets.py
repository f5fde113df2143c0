"""Live, stored, cached, replayed, sparse: what do a student's accuracy, its epoch and the disk say? Few labels, several seeds.

    python benchmarks/targets.py                                    # digits, 5 seeds
    python benchmarks/targets.py --data cifar10 --folder cifar10    # CIFAR-10 as a folder of images, train/CLASS/*.jpg and test/CLASS/*.jpg

Each row of targets.csv is one run; rows that are there already are not run again. Students of a seed start from the same weights and see the items in the same order. Epochs are timed
without validation, as the median over the epochs of a run; the runs of a seed come one after the other, so compare within a seed."""
from fastai.vision.all import *
from functools import lru_cache
from fastcore.script import call_parse
from fastkd.all import *
from fastkd.test_utils import digits_dls,digits_learner,tiny_cnn
from defaults import OnlyLastValid,cifar10_dls

class EpochTime(Callback):
    "Seconds of each training phase"
    def before_train(self): self.t = time.perf_counter()
    def after_train(self): self.times = [*getattr(self, 'times', []),time.perf_counter()-self.t]

def augment(size): return aug_transforms(do_flip=size==32, max_rotate=15, min_zoom=.9, max_zoom=1.2, max_warp=.1, max_lighting=0, p_lighting=0, p_affine=1., size=size)

def train_teacher(dls, ch, epochs=12):
    set_seed(0, reproducible=True)
    learn = Learner(dls, tiny_cnn((32,64,128), ch=ch), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=OnlyLastValid())
    return learn

@lru_cache
def digits_net(aug): return train_teacher(digits_dls(batch_tfms=augment(8) if aug else None), 1)
def digits(folder, seed, aug): return digits_net(aug), digits_dls(150, seed=seed, batch_tfms=augment(8) if aug else None), partial(tiny_cnn, (4,8,16)), 60

def _cifar10(folder, n, seed, aug):
    dls = cifar10_dls(folder, n, seed)
    if aug: dls.train.after_batch.add([t for t in augment(32)])
    return dls
@lru_cache
def cifar10_net(folder, aug): return train_teacher(_cifar10(folder, 10000, 0, aug), 3)
def cifar10(folder, seed, aug):
    folder = Path(folder)
    return cifar10_net(folder, aug), _cifar10(folder, 1500, seed+1, aug), partial(tiny_cnn, (8,16,32), ch=3), 20

works = dict(digits=digits, cifar10=cifar10)
# random transforms?, how the answers come, keywords
settings = {'student alone':(False,None,{}), 'live':(False,'live',{}), 'stored':(False,'store',{}), 'stored, one byte':(False,'store',dict(kind='dense8')),
    'stored, 4 of 10 classes':(False,'store',dict(kind='sparse', T=4., k=4)), 'cached':(False,'cache',{}),
    'augmented: student alone':(True,None,{}), 'augmented: live':(True,'live',{}), 'augmented: stored, 8 views':(True,'store',dict(views=8)), 'augmented: stored, 1 view':(True,'store',dict(views=1)),
    'augmented: cached, 8 views':(True,'cache',dict(views=8)), 'augmented: stored without replay':(True,'store',dict(stale_ok=True))}

def callback(how, kw, teacher, dls, d):
    "The callback of a setting, and the bytes per item on disk"
    if how is None: return [],0
    if how=='live': return [KnowledgeDistillation(teacher, T=4., log=False)],0
    if how=='cache': return [KnowledgeDistillation(teacher, T=4., cache=d/'cache', log=False, **kw)],None
    store = precompute_targets(teacher, dls, d/'store', bar=noop, **kw)
    return [KnowledgeDistillation(store, T=4., log=False)],store.views*row_bytes(store.spec)

def run(work, folder, seed, setting):
    "Accuracy, seconds per epoch, bytes per item"
    aug,how,kw = settings[setting]
    teacher,dls,make_model,epochs = works[work](folder, seed, aug)
    with tempfile.TemporaryDirectory() as d:
        cbs,size = callback(how, kw, teacher, dls, Path(d))
        set_seed(seed, reproducible=True)
        dls.train.rng = random.Random(seed)
        learn,clock = Learner(dls, make_model(), metrics=accuracy),EpochTime()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=[OnlyLastValid(),clock,*cbs])
        if size is None: size = (st:=TargetStore(Path(d)/'cache')).views*row_bytes(st.spec)
    return learn.recorder.values[-1][2],np.median(clock.times),size

@call_parse
def main(
    data:str='digits', # 'digits' or 'cifar10'
    folder:str=None, # Where CIFAR-10 lies
    n_seeds:int=5, # Runs of each setting
    out:str=str(Path(__file__).parent/'targets.csv') # Results, one row a run
):
    "Train a small student with answers that come in different ways"
    torch.set_num_threads(1)
    df = pd.read_csv(out) if Path(out).exists() else pd.DataFrame(columns=['data','setting','seed','accuracy','seconds','bytes'])
    for seed in range(n_seeds):
        for nm in settings:
            if ((df.data==data)&(df.setting==nm)&(df.seed==seed)).any(): continue
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', message='the stored targets are for items without')
                df.loc[len(df)] = [data,nm,seed,*run(data, folder, seed, nm)]
            df.to_csv(out, index=False, float_format='%.5g')
            print(f'{data} seed {seed} {nm:36} {df.accuracy.iloc[-1]:.4f} {1e3*df.seconds.iloc[-1]:8.1f} ms {df.bytes.iloc[-1]:5}', flush=True)
