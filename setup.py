"Everything about the package is said in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
o = ini['DEFAULT']
lib = o['lib_name']
status = '1 - Planning,2 - Pre-Alpha,3 - Alpha,4 - Beta,5 - Production/Stable'.split(',')[int(o['status'])-1]
def rows(k): return [l.strip() for l in o.get(k, '').splitlines() if l.strip()]

setup(
    name=lib, version=o['version'], license_expression=o['license'], author=o['author'], author_email=o['author_email'],
    keywords=o['keywords'].split(','), python_requires=f">={o['min_python']}",
    classifiers=[f'Development Status :: {status}', 'Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']), install_requires=rows('requirements'),
    extras_require={k.removesuffix('_requirements'): rows(k) for k in o if k.endswith('_requirements')},
    entry_points={'console_scripts': rows('console_scripts'), 'nbdev': [f'{lib} = {lib}._modidx:d']})
