"The script of the tutorial on many GPUs, which is not executed there, in two processes on the CPU"
import json,re,sys
import pytest
pytest.importorskip('accelerate')
from fastai.vision.all import CrossEntropyLossFlat,ImageDataLoaders,Learner,PILImage,Resize,accuracy,load_learner,nn,np,pd
from fastkd.all import TargetStore
from sklearn.datasets import load_digits
from conftest import root,run

# fastai sends the order of the items by way of a GPU
patch = '''
import torch
from fastai.distributed import DistributedDL
def _send(self, t, rank):
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = _send
'''

def cells(): return [''.join(c['source']) for c in json.loads((root/'nbs/tutorials/11_many_gpus.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The script, 40 images of two classes, and a teacher"
    d,digits = tmp_path_factory.mktemp('gpus'),load_digits(n_class=2)
    for k in '01': (d/'images'/k).mkdir(parents=True)
    for i in range(40): PILImage.create(np.uint8(15.9*digits.images[i])).save(d/'images'/str(digits.target[i])/f'{i}.png')
    name,script = cells()[0].split('\n', 1)
    assert name=='%%writefile train.py'
    (d/'train.py').write_text(patch+script)
    dls = ImageDataLoaders.from_folder(d/'images', valid_pct=.2, seed=0, item_tfms=Resize(16, 'squish'), bs=8, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=d)
    with learn.no_bar(), learn.no_logging(): learn.fit(5, 1e-2)
    learn.export('teacher.pkl')
    return d

def test_script(folder):
    args = ['images','teacher.pkl','--answers','answers','--epochs',1,'--bs',8,'--size',16,'--workers',0,'--cpu']
    r = run(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'train.py', *args, cwd=folder, PYTHONPATH=str(root), PYTHONWARNINGS='ignore')
    assert r.stdout.count('2 processes, 1 epochs')==1, r.stdout[-5000:]
    store = TargetStore(folder/'answers')
    assert len(store)==40 and len(store.parts)==2
    log = pd.read_csv(folder/'log.csv')
    assert len(log)==1 and {'task_loss','kd_loss','accuracy'}<=set(log.columns) and log.notna().all(axis=None)
    student = load_learner(folder/'student.pkl')
    assert type(student.model).__name__=='Sequential' and list(student.dls.vocab)==['0','1']

def test_commands():
    "The arguments of the commands on the page are those of the script"
    known = set(re.findall(r'^    (\w+):', cells()[0], re.M))
    for o in cells()[1:]:
        for c in re.findall(r'train\.py.*', o): assert set(re.findall(r'--(\w+)', c))<=known, c
