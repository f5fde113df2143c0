"""Which loss, temperature and weight? Small students on few labels, several seeds, two data sets.

    python benchmarks/defaults.py                                    # digits, 5 seeds
    python benchmarks/defaults.py --data cifar10 --folder cifar10    # CIFAR-10 as a folder of images, train/CLASS/*.jpg and test/CLASS/*.jpg

Each row of defaults.csv is one run; rows that are there already are not run again."""
from fastai.vision.all import *
from functools import lru_cache
from fastcore.script import call_parse
from fastkd.all import *
from fastkd.test_utils import MemoryDL, digits_dls, digits_teacher, tiny_cnn

class OnlyLastValid(Callback):
    "Validate after the last epoch only"
    def before_validate(self):
        if self.epoch<self.n_epoch-1: raise CancelValidException

@lru_cache
def digits_net(): return digits_teacher()

def digits(folder, seed):
    return digits_net(), lambda: digits_dls(n_labels=150, seed=seed), lambda: tiny_cnn((4,8,16)), 60

def cifar10_dls(folder, n, seed):
    classes = sorted(o.name for o in (folder/'train').ls())
    pick = random.Random(seed)
    trn = sum([L(pick.sample(sorted((folder/'train'/c).ls()), n//10)) for c in classes], L())
    val = sum([L(sorted((folder/'test'/c).ls())[:200]) for c in classes], L())
    db = DataBlock(blocks=(TransformBlock(type_tfms=PILImage.create, item_tfms=ToTensor, batch_tfms=IntToFloatTensor, dl_type=MemoryDL), CategoryBlock), get_y=parent_label,
        splitter=GrandparentSplitter('train','test'), batch_tfms=Normalize.from_stats([.49,.48,.45], [.25,.24,.26], cuda=False))
    return db.dataloaders(trn+val, bs=64, val_bs=500, drop_last=False, num_workers=0)

@lru_cache
def cifar10_net(folder):
    set_seed(0, reproducible=True)
    learn = Learner(cifar10_dls(folder, 10000, 0), tiny_cnn((32,64,128), ch=3), metrics=accuracy)
    with learn.no_bar(): learn.fit_one_cycle(12, 1e-2, cbs=OnlyLastValid())
    return learn

def cifar10(folder, seed):
    folder = Path(folder)
    return cifar10_net(folder), lambda: cifar10_dls(folder, 1500, seed+1), lambda: tiny_cnn((8,16,32), ch=3), 20

works = dict(digits=digits, cifar10=cifar10)
configs = {'student alone': None,
    **{f'kd T={T} alpha={a}': dict(loss='kd', T=T, alpha=a) for a in (.2,.5,.9) for T in (1.,2.,4.,8.,20.)},
    **{f'{l} alpha={a}': dict(loss=l, alpha=a) for l in ('dkd','nkd') for a in (.2,.5)},
    **{f'nkd T={T} alpha={a}': dict(loss='nkd', T=T, alpha=a) for T in (2.,4.) for a in (.5,.9)},
    **{f'dkd T=8.0 alpha={a}': dict(loss='dkd', T=8., alpha=a) for a in (.1,.2)},
    **{f'{l} alpha=.5': dict(loss=l, alpha=.5) for l in ('mse_logits','dist','lskd','mlkd','ttm','jsd','rkl')}}

@call_parse
def main(
    data:str='digits', # 'digits' or 'cifar10'
    folder:str=None, # Where CIFAR-10 lies
    n_seeds:int=5, # Runs of each setting
    out:str=str(Path(__file__).parent/'defaults.csv') # Results, one row a run
):
    "Train a small student alone and with each setting; same initial weights and data order per seed"
    torch.set_num_threads(1)
    df = pd.read_csv(out) if Path(out).exists() else pd.DataFrame(columns=['data','setting','seed','accuracy'])
    for seed in range(n_seeds):
        teacher,make_dls,make_model,epochs = works[data](folder, seed)
        if not ((df.data==data)&(df.setting=='teacher')).any(): df.loc[len(df)] = [data,'teacher',0,teacher.validate()[1]]
        dls = make_dls()
        for nm,kw in configs.items():
            if ((df.data==data)&(df.setting==nm)&(df.seed==seed)).any(): continue
            set_seed(seed, reproducible=True)
            dls.train.rng = random.Random(seed)
            learn = Learner(dls, make_model(), metrics=accuracy)
            cbs = [OnlyLastValid()]+([] if kw is None else [KnowledgeDistillation(teacher, log=False, **kw)])
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
            df.loc[len(df)] = [data,nm,seed,learn.recorder.values[-1][2]]
            df.to_csv(out, index=False, float_format='%.4f')
            print(f'{data} seed {seed} {nm:22} {df.accuracy.iloc[-1]:.4f}', flush=True)
