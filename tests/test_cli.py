"The commands and the example script, as a shell runs them"
import importlib.util,io,os,signal,subprocess,sys,time
from contextlib import redirect_stdout
from pathlib import Path
import numpy as np,pandas as pd,pytest,torch
from PIL import Image
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastkd import cli
from fastkd.all import *
from fastkd.test_utils import *
from conftest import root,run
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

@pytest.fixture(scope='module')
def d(tmp_path_factory):
    "A folder of digits by class, and the export of a teacher that learned from it"
    d,digits = tmp_path_factory.mktemp('cli'),load_digits()
    for i in range(120):
        (f:=d/'images'/'zyxwvutsrq'[digits.target[i]]/f'{i}.png').parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i]*15.9).astype('uint8')).save(f)
    learn = digits_learner(image_dls(d, item_tfms=RandomResizedCrop(8, min_scale=.6)), (8,16), path=d)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    learn.export('augmented.pkl')
    learn = digits_learner(image_dls(d), (8,16), path=d)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    learn.export('plain.pkl')
    return d

def image_dls(d, vocab=None, **kw):
    db = DataBlock((ImageBlock(PILImageBW),CategoryBlock(vocab=vocab, sort=vocab is None)), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=0), **kw)
    return db.dataloaders(d/'images', path=d/'images', bs=16, num_workers=0)

def fastkd(nm, *args):
    "What a command prints; in this process, which has imported all that takes time"
    i,kw = first(i for i,o in enumerate([*args,'--']) if str(o).startswith('--')),{}
    for k,v in zip(args[i:], [*args[i+1:],'--']):
        if str(k).startswith('--'): kw[k[2:]] = True if str(v).startswith('--') else v
    with redirect_stdout(io.StringIO()) as f: getattr(cli, nm).__wrapped__(*map(str, args[:i]), **kw)
    return f.getvalue()

class TestPrecompute:
    def test_answers_are_the_teachers(self, d):
        "Through the shell"
        out = run('fastkd-precompute', d/'plain.pkl', d/'images', d/'plain', '--labels', '--bs', 50, '--workers', 0, cwd=root).stdout
        assert '120 items in' in out
        learn,s = load_learner(d/'plain.pkl'),TargetStore(d/'plain')
        with learn.no_bar(): z,y = learn.get_preds(dl=learn.dls.test_dl(fs:=sorted(get_image_files(d/'images')), with_labels=True), act=noop)
        got = torch.stack([s[f.relative_to(d/'images')] for f in fs]).float()
        torch.testing.assert_close(got.log_softmax(1), z.log_softmax(1), rtol=0, atol=5e-3)
        assert s.vocab==list(learn.dls.vocab) and abs(s.accuracy()-(z.argmax(1)==y).float().mean().item())<1e-6

    def test_a_student_learns_from_it(self, d):
        "With its classes in another order: the loss of the first batch, by hand"
        fastkd('precompute', d/'plain.pkl', d/'images', d/'plain2')
        learn,seen = digits_learner(image_dls(d, vocab=list('zyxwvutsrq'))),{}
        class Spy(Callback):
            run_valid,order = False,100
            def after_loss(self):
                if not seen: seen.update(x=self.x.clone(), y=self.y.clone(), z=self.pred.detach().clone(), loss=self.learn.loss_grad.item())
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True): learn.fit(1, 0., cbs=[KnowledgeDistillation(d/'plain2', T=2., alpha=.7),Spy()])
        t = load_learner(d/'plain.pkl')
        with torch.no_grad(): zt = t.model.eval()(seen['x'])[:,[list(t.dls.vocab).index(o) for o in 'zyxwvutsrq']]
        kl = (F.softmax(zt/2, 1)*(F.log_softmax(zt/2, 1)-F.log_softmax(seen['z']/2, 1))).sum(1).mean()
        assert abs(seen['loss']-(.3*F.cross_entropy(seen['z'], seen['y'])+.7*4*kl).item())<2e-3

    def test_views_are_those_of_training(self, d):
        fastkd('precompute', d/'augmented.pkl', d/'images', d/'views', '--views', 2)
        assert 'RandomResizedCrop' in fastkd('precompute', d/'augmented.pkl', d/'images', d/'clean')
        s = TargetStore(d/'views')
        assert s.views==2 and s.replay
        learn,seen = digits_learner(image_dls(d, item_tfms=RandomResizedCrop(8, min_scale=.6))),[]
        t = load_learner(d/'augmented.pkl').model.eval()
        class Spy(Callback):
            run_valid,order = False,100
            def after_loss(self):
                with torch.no_grad(): zt = t(self.x.as_subclass(Tensor))
                kd = first(cb for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillation))
                seen.append((zt.log_softmax(1)-kd._ask().log_softmax(1)).abs().max().item())
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=[KnowledgeDistillation(d/'views'),Spy()])
        assert len(seen)==12 and max(seen)<1e-2

    def test_goes_on(self, d):
        "Items that came later are added, the others are not asked again"
        fs = sorted(get_image_files(d/'images'))
        kept = d/'kept'
        for f in fs[:60]: (g:=kept/f.relative_to(d/'images')).parent.mkdir(parents=True, exist_ok=True); g.write_bytes(f.read_bytes())
        assert '60 items' in fastkd('precompute', d/'plain.pkl', kept, d/'grows')
        before = {p:p.stat().st_mtime_ns for p in (d/'grows').rglob('*.npy')}
        for f in fs[60:]: (g:=kept/f.relative_to(d/'images')).parent.mkdir(parents=True, exist_ok=True); g.write_bytes(f.read_bytes())
        assert '120 items' in fastkd('precompute', d/'plain.pkl', kept, d/'grows')
        assert before and all(p.stat().st_mtime_ns==t for p,t in before.items())

    @pytest.mark.parametrize('args,msg', [(('no.pkl','images','s'), "no file"), (('plain.pkl','nothing','s'), 'no folder'), (('plain.pkl','images','s','--files','*.wav'), "no *.wav in"),
        (('plain.pkl','images','s','--kind','thin'), "'dense8'"), (('plain.pkl','images','s','--kind','sparse'), 'T'), (('plain.pkl','images','s','--views',0), 'at least 1'), (('plain.pkl','images','s','--bs',0), '--bs must be at least 1'), (('plain.pkl','images','s','--workers',-1), '--workers must be at least 0'), (('broken.pkl','images','s'), 'could not be read')])
    def test_bad_input(self, d, args, msg):
        (d/'broken.pkl').write_bytes(b'no pickle')
        with pytest.raises(SystemExit) as e: fastkd('precompute', *(d/o for o in args[:3]), *args[3:])
        assert str(e.value).startswith('fastkd-precompute: ') and msg in str(e.value)

class TestInfo:
    def test_info(self, d):
        fastkd('precompute', d/'plain.pkl', d/'images', d/'info', '--kind', 'sparse', '--temp', 2, '--k', 4)
        out = fastkd('info', d/'info', '--verify')
        assert '120 rows are as they were written' in out and 'made with' in out and 'sparse' in out and 'q, r, s, t' in out
        f = max((d/'info').rglob('*.npy'), key=lambda p: p.stat().st_size)
        b = bytearray(f.read_bytes()); b[-3] ^= 255; f.write_bytes(b)
        r = run('fastkd-info', d/'info', '--verify', cwd=root, ok=False)
        assert r.returncode==1 and '1 of 120 stored rows are damaged' in r.stdout and 'Traceback' not in r.stdout
    def test_no_store(self, d):
        with pytest.raises(SystemExit, match='fastkd-info: no stored targets'): fastkd('info', d/'images')

script = root/'examples/train.py'
spec = importlib.util.spec_from_file_location('train_example', script)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
small = ['--epochs',3,'--bs',128]
def shell(*args): return [str(o) for o in (script, *small, *args)]
def train(*args):
    "The script, in this process"
    argv,sys.argv = sys.argv,shell(*args)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            example.main()
    finally: sys.argv = argv
def weights(p): return torch.load(p/'models/weights.pth', weights_only=True)
def same(a, b): return set(a)==set(b) and all(torch.equal(v, b[k]) for k,v in a.items())

class TestExample:
    @pytest.fixture(scope='class')
    def teacher(self, tmp_path_factory):
        train('--arch', 'wide', '--out', p:=tmp_path_factory.mktemp('teacher'))
        return p

    def test_killed_and_resumed(self, teacher, tmp_path):
        "Student, optimizer and adapter go on as if nothing had happened"
        args = ['--kd-teacher', teacher/'learner.pkl', '--hint', '1']
        train(*args, '--out', tmp_path/'full')
        p = subprocess.Popen([sys.executable, *shell(*args, '--out', tmp_path/'part')], cwd=root, env={**os.environ, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (fs:=[*(tmp_path/'part').glob('models/epoch_*.pth')]) and p.poll() is None: time.sleep(.02)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert fs and not (tmp_path/'part/models/weights.pth').exists(), 'it was not killed in the middle'
        run('python', *shell(*args, '--out', tmp_path/'part', '--resume'), cwd=root, PYTHONWARNINGS='ignore')
        assert same(weights(tmp_path/'full'), weights(tmp_path/'part'))
        a = pd.read_csv(tmp_path/'full/history_0.csv').set_index('epoch')
        b = pd.concat(pd.read_csv(f) for f in (tmp_path/'part').glob('history_*.csv')).set_index('epoch')
        for k in ('valid_loss','accuracy','task_loss','kd_loss','hint'): assert a.loc[2,k]==b.loc[2,k]
        # the end of a run can be resumed, too
        train(*args, '--out', tmp_path/'part', '--resume')
        assert same(weights(tmp_path/'full'), weights(tmp_path/'part'))
        assert len(load_learner(tmp_path/'part/learner.pkl').dls.vocab)==10

    def test_weights_are_the_same_teacher(self, teacher, tmp_path):
        "An export, and the architecture with its weights"
        kw = ['--kd-temp', 2, '--kd-distill-wt', .9, '--kd-student-wt', .5, '--kd-start-epoch', 1]
        train('--kd-teacher', teacher/'learner.pkl', *kw, '--out', tmp_path/'a')
        train('--kd-teacher', 'wide', '--kd-resume', teacher/'models/weights.pth', *kw, '--out', tmp_path/'b')
        assert same(weights(tmp_path/'a'), weights(tmp_path/'b'))
        h = pd.read_csv(tmp_path/'a/history_0.csv')
        assert h.kd_loss.isna().tolist()==[True,False,False]

    @pytest.mark.parametrize('args,msg', [(['--kd-temp','4'], '--kd-temp without --kd-teacher'), (['--kd-teacher','wide'], '--kd-resume'), (['--kd-teacher','wid'], "Did you mean 'wide'"),
        (['--kd-temp','-1'], 'argument --kd-temp'), (['--resume'], 'argument --resume: no run'), (['--arch','resnet18'], 'argument --arch'), (['--data','nowhere'], 'argument --data'), (['--hint','1'], 'argument --hint')])
    def test_bad_flags(self, tmp_path, args, msg, capsys):
        sys.argv,argv = shell(*args, '--out', tmp_path),sys.argv
        try:
            with pytest.raises(SystemExit) as e: example.main()
        finally: sys.argv = argv
        assert e.value.code==2 and msg in capsys.readouterr().err

    def test_folder_of_images(self, d, tmp_path):
        train('--data', d/'images', '--arch', 'squeezenet1_1', '--size', 32, '--epochs', 1, '--out', tmp_path)
        assert list(load_learner(tmp_path/'learner.pkl').dls.vocab)==list('qrstuvwxyz')
