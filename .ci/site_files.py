"""A hook of MkDocs: gives the site the folders of the repository, so that relative links work on GitHub and on the site.

Pages of docs/ keep that folder in their address, and the files outside it that pages link to are added.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_OUTSIDE = (
    '*.md',
    'CITATION.cff',
    'LICENSE',
    'benchmarks/results/**/*.*',
    'tests/data/README.md',
    'train_configs/*',
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    paths = [docs / file.src_uri for file in files.documentation_pages() + list(files.static_pages())]
    paths += [path for pattern in _OUTSIDE for path in sorted(root.glob(pattern)) if path.is_file()]
    theirs = [file for file in files if not file.src_dir == str(docs)]
    return Files(
        theirs + [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in paths]
    )
