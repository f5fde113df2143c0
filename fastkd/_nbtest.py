"Run by `nbdev-test` before its workers start (`test_setup` in pyproject.toml)"
def preload(cells):
    "Import what is slow and not fastai's once; fastai stays out, since its `@patch`es would hide a notebook's missing import"
    import IPython,matplotlib.pyplot,pandas,scipy,sklearn.metrics,torch,torchvision
