#!/usr/bin/env python
"""Train, distil and resume from the shell, on scikit-learn's digits or on a folder of images with a subfolder per class

python train.py --arch wide --epochs 10 --out runs/teacher
python train.py --arch small --epochs 10 --out runs/student --kd-teacher runs/teacher/learner.pkl
python train.py --arch small --epochs 10 --out runs/student --kd-teacher runs/teacher/learner.pkl --resume
"""
import argparse
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import digits_dls,tiny_cnn

archs = {'small':partial(tiny_cnn, (4,8,16)), 'wide':partial(tiny_cnn, (32,64,128))}

def get_dls(args):
    if args.data is None: return digits_dls(bs=args.bs)
    return ImageDataLoaders.from_folder(args.data, valid_pct=.2, seed=0, item_tfms=Resize(args.size), bs=args.bs)

def get_learner(dls, args):
    if args.data is None: return Learner(dls, archs[args.arch](get_c(dls)), metrics=accuracy, path=args.out)
    arch = getattr(models, args.arch, args.arch) # of torchvision, else of timm
    return vision_learner(dls, arch, pretrained=args.pretrained, metrics=accuracy, path=args.out)

class Checkpoint(Callback):
    "After each epoch writes all that a later process needs to go on as if it had never stopped"
    def __init__(self, folder, seed, kd=None): self.folder,self.seed,self.kd,self.start = Path(folder),seed,kd,0

    @property
    def files(self): return sorted(self.folder.glob('epoch_*.pth'), key=lambda f: int(f.stem[6:]))

    def load(self, learn):
        "Go on with the last epoch that was finished"
        f = self.files[-1]
        learn.load(f.stem)
        if (kd:=f.with_name(f'kd_{f.name}')).is_file(): self.kd.load(kd)
        self.start = int(f.stem[6:])+1

    def before_epoch(self):
        # random numbers of an epoch depend on its number alone, not on the epochs before
        set_seed(self.seed+self.epoch)
        self.dls.train.rng = random.Random(self.seed+self.epoch)

    def after_epoch(self):
        if self.epoch<self.start: return # was skipped
        old,nm = self.files,f'epoch_{self.epoch}.pth'
        # adapters of terms, or a teacher that is trained along
        if self.kd is not None and (self.kd.terms or self.kd.teacher_weight): self.kd.save(self.folder/f'kd_{nm}')
        # a file has its name only when it is whole, whenever the process is killed
        os.replace(self.learn.save('unfinished'), self.folder/nm)
        for f in old: f.unlink(); f.with_name(f'kd_{f.name}').unlink(missing_ok=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder of images with a subfolder per class; left out: the digits of scikit-learn')
    p.add_argument('--size', type=int, default=128, help='height and width of the images in --data')
    p.add_argument('--arch', default='small', help=f"{' or '.join(archs)}; with --data an architecture of torchvision or timm")
    p.add_argument('--pretrained', action='store_true', help='with --data: start from weights that are downloaded')
    p.add_argument('--hint', metavar='LAYER', help='also compare this layer of the student with the same one of the teacher')
    for nm,v in dict(epochs=10, bs=64, lr=1e-2, seed=42).items(): p.add_argument(f'--{nm}', type=type(v), default=v)
    p.add_argument('--out', type=Path, default=Path('runs'), help='folder of all that is written')
    p.add_argument('--resume', action='store_true', help='go on with the run in --out')
    add_distillation_args(p, archs)
    args = p.parse_args()
    if args.data is None and args.arch not in archs: p.error(f"argument --arch: {args.arch!r} is none of {', '.join(archs)}, which the digits are for")
    if args.data is not None and not args.data.is_dir(): p.error(f"argument --data: no folder {str(args.data)!r}")
    if args.resume and not [*args.out.glob('models/epoch_*.pth')]: p.error(f"argument --resume: no run in {str(args.out)!r}")
    if args.hint and args.kd_teacher is None: p.error('argument --hint: needs --kd-teacher')

    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    learn = get_learner(get_dls(args), args)
    terms = [Term('hint', args.hint, args.hint)] if args.hint else []
    try: kd = KnowledgeDistillation.from_args(args, learn.dls, archs, terms=terms)
    except ValueError as e: p.error(str(e))
    checkpoint = Checkpoint(args.out/'models', args.seed, kd)
    if args.resume: checkpoint.load(learn)
    log = CSVLogger(f'history_{checkpoint.start}.csv') # a resumed run has a file of its own
    learn.fit_one_cycle(args.epochs, args.lr, start_epoch=checkpoint.start, cbs=[checkpoint,log,*L(kd)])
    learn.export('learner.pkl') # for `load_learner`, and as --kd-teacher of the next run
    learn.save('weights', with_opt=False) # for --kd-teacher ARCH --kd-resume

if __name__=='__main__': main()
