"""The pages: their Python runs, their commands parse, and the models, links and files that they name exist."""

import argparse
import ast
import csv
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt

import timm_harmonic
import timm_harmonic_cli as cli

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'train_configs' / 'README.md']
# Pages whose Python takes more than three seconds.
SLOW = {f'docs/{name}.md' for name in ('compression', 'layers', 'models', 'small-network')}
MARKDOWN = MarkdownIt('commonmark').enable('table')
# What a fence may be: commands and what needs a network (no name), Python that runs, Python that runs
# with fastai, or neither.
LANGUAGES = {'', 'python', 'python title="fastai"', 'text', 'bibtex'}


def name_of(page):
    return str(page.relative_to(ROOT))


def tokens_of(page):
    """The page's tokens, with those inside paragraphs, headings and tables."""
    for token in MARKDOWN.parse(page.read_text()):
        yield token
        yield from token.children or ()


def fences(page, language):
    """Contents of a page's code blocks in this language."""
    return [token.content for token in tokens_of(page) if token.type == 'fence' and token.info.strip() == language]


def code_spans(page):
    return [token.content for token in tokens_of(page) if token.type == 'code_inline']


each_page = pytest.mark.parametrize('page', PAGES, ids=name_of)


@each_page
def test_every_code_block_is_of_a_known_kind(page):
    """Otherwise a block of Python under another name would not run."""
    kinds = [(token.type, token.info.strip()) for token in tokens_of(page) if token.type in ('fence', 'code_block')]
    assert {kind for kind, _ in kinds} <= {'fence'}, 'indented code is not checked'
    assert {language for _, language in kinds} <= LANGUAGES


def check_printed(block, printed):
    """That `print(x)  # literal` prints this value. Other comments are not checked."""
    for number, line in enumerate(block.splitlines(), start=1):
        comment = re.fullmatch(r'print\(.*\)  # (.+)', line)
        if comment is None:
            continue
        try:
            value = ast.literal_eval(comment.group(1))
        except (SyntaxError, ValueError):
            continue
        assert printed[number] == (value,), line


WITH_PYTHON = [
    pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW else (), id=name_of(page))
    for page in PAGES
    if fences(page, 'python')
]


@pytest.mark.parametrize('page', WITH_PYTHON)
def test_python_runs(page, tmp_path, monkeypatch, record_property):
    """All blocks in order, in one namespace and an empty folder, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed = {}

    def note(*values):
        printed[sys._getframe(1).f_lineno] = values

    namespace, ran = {'print': note}, 0
    for block in fences(page, 'python'):
        printed.clear()
        exec(compile(block, f'{name_of(page)}, block {ran + 1}', 'exec'), namespace)
        check_printed(block, printed)
        ran += 1
    assert ran == len(re.findall(r'^\s*```+ *python *$', page.read_text(), re.MULTILINE))
    record_property('blocks', ran)


def test_arrays_are_predicted_as_they_were_trained(tmp_path, monkeypatch, capsys):
    """The page's loop, then its commands: the same class for every image as the network had in the loop."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / 'docs' / 'your-images.md'
    (code,) = (block for block in fences(page, 'python') if 'ImageFolder' in block)
    namespace = {}
    torch.manual_seed(0)
    exec(compile(code, 'docs/your-images.md', 'exec'), namespace)
    section = page.read_text().split('<!-- round trip -->')[1]
    convert, predict = commands_in(section.split('```')[1])
    assert cli.main([*convert, '--quiet']) == cli.main([*predict, '--quiet']) == 0
    assert 'warning' not in capsys.readouterr().err
    images, model = namespace['validation'], namespace['model'].eval()
    with torch.inference_mode():
        expected = [images.classes[int(model(image[None]).argmax())] for image, _ in images]
    rows = list(csv.DictReader(Path('classes.csv').read_text().splitlines()))
    assert [row['file'] for row in rows] == [str(path) for path in images.files]
    assert [row['class_1'] for row in rows] == expected
    assert set(expected) == {'field', 'forest'}


@pytest.mark.slow
def test_python_with_fastai_runs(tmp_path):
    """fastai brings spaCy and more, so that it is not among what the tests install: pip install '.[fastai]'."""
    pytest.importorskip('fastai')
    (page,) = (page for page in PAGES if fences(page, 'python title="fastai"'))
    code = '\n'.join(fences(page, 'python')[:1] + fences(page, 'python title="fastai"'))
    code += '\nassert len(learner.recorder.values) == 1 and learner.model[0].model.conv1.in_channels == 13'
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)


def test_the_readme_and_some_pages_have_python():
    assert fences(README, 'python')
    assert sum(bool(fences(page, 'python')) for page in PAGES) >= 5


def commands(page):
    """Arguments of each `timm-harmonic` or `python -m timm_harmonic` in a page's code blocks."""
    for block in fences(page, ''):
        yield from commands_in(block)


def commands_in(block):
    for line in block.replace('\\\n', ' ').splitlines():
        if not re.search('timm[-_]harmonic', line):
            continue
        for part in line.split('&&'):
            words = shlex.split(part, comments=True)
            if words and Path(words[0]).name == 'timm-harmonic':
                yield words[1:]
            elif words[1:3] == ['-m', 'timm_harmonic'] and not words[3].endswith('.py'):
                yield words[3:]


def parse(words):
    """The parser's result. pytest would take its SystemExit for the end of the run."""
    try:
        return cli.build_parser().parse_args(words)
    except SystemExit as error:
        pytest.fail(f'timm-harmonic {shlex.join(words)}: {error}')


@each_page
def test_commands_parse(page):
    for words in commands(page):
        assert parse(words).run


def subcommands():
    """The parser of each command by name."""
    (action,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_pages_show_every_command():
    shown = {words[0] for page in PAGES for words in commands(page)}
    shown |= {span.split()[1] for page in PAGES for span in code_spans(page) if span.startswith('timm-harmonic ')}
    assert shown == set(subcommands())


@each_page
def test_commands_in_sentences_exist(page):
    """`timm-harmonic COMMAND --option` in a sentence may lack arguments; what is there is known."""
    for span in code_spans(page):
        if span.startswith('timm-harmonic '):
            command, *words = shlex.split(span)[1:]
            options = {word.partition('=')[0] for word in words if word.startswith('-')}
            assert options <= set(subcommands()[command]._option_string_actions), span


def named_models(page):
    """Harmonic models that a page names: in a code span of their own, as an option, or in create_model."""
    code = [*code_spans(page), *fences(page, ''), *fences(page, 'text')]
    for text in code:
        yield from re.findall(r'^harm\d?_\w+$', text)
        yield from re.findall(r"(?:--model |create_model\(')(harm\d?_\w+|harmonized)\b", text)


@each_page
def test_models_that_are_named_exist(page):
    for name in named_models(page):
        # In train_configs/ a name may be that of a file.
        assert timm.is_model(name) or (page.parent / f'{name}.yaml').is_file(), name


def test_all_models_are_named():
    named = {name for page in PAGES for name in named_models(page)} | {'harmonized'}
    assert set(timm.list_models('harm*')) <= named


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    found = []
    tokens = MARKDOWN.parse(page.read_text())
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == 'heading_open':
            text = ''.join(part.content for part in inline.children)
            anchor = re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')
            found.append(f'{anchor}-{count}' if (count := found.count(anchor)) else anchor)
    return found


def links(page):
    """Targets of a page's links and images, those in HTML included."""
    for token in tokens_of(page):
        if token.type in ('link_open', 'image'):
            yield token.attrGet('href') or token.attrGet('src')
        elif token.type in ('html_block', 'html_inline'):
            yield from re.findall(r'(?:src|href)="([^"]+)"', token.content)


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md'], ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == 'https', link
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors(target / 'README.md' if target.is_dir() else target), link


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CONTRIBUTING.md'], ids=name_of)
def test_files_in_sentences_exist(page):
    """Files and folders of the repository in code spans, by their path from its root. Patterns have to match one."""
    for span in code_spans(page):
        if re.fullmatch(r'(timm_harmonic|train_configs|tests|docs|benchmarks)/[\w./*-]*', span):
            assert list(ROOT.glob(span)), span


def test_every_page_is_in_the_index():
    index = ROOT / 'docs' / 'README.md'
    linked = {(index.parent / link).resolve() for link in links(index)}
    pages = {*(ROOT / 'docs').glob('*.md'), *(ROOT / 'docs').glob('*.ipynb')} - {index}
    assert pages <= linked


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1000


@pytest.mark.slow
def test_tables_are_up_to_date():
    command = [sys.executable, str(ROOT / 'docs' / 'tables.py'), '--check']
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert result.returncode == 0, f'python docs/tables.py would change:\n{result.stdout}{result.stderr}'


def bibtex(text):
    """Fields of the entries in BibTeX, one dictionary each."""
    entries = text.split('\n@')
    return [dict(re.findall(r'(\w+)\s*=\s*\{([^{}]*)\}', entry)) for entry in entries]


@pytest.mark.parametrize('page', [README, ROOT / 'timm_harmonic' / 'export' / 'card.md'], ids=name_of)
def test_citations_agree(page):
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    paper = citation['preferred-citation']
    (entry,) = (entry for entry in bibtex('\n'.join(fences(page, 'bibtex'))) if entry.get('doi') == paper['doi'])
    fields = dict(title='title', journal='journal', volume='volume', pages='start', year='year')
    assert {field: entry[field] for field in fields} == {field: str(paper[key]) for field, key in fields.items()}
    people = [f'{person["family-names"]}, {person["given-names"]}' for person in paper['authors']]
    assert entry['author'].split(' and ') == people


def test_citation_file_has_the_version():
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == timm_harmonic.__version__
