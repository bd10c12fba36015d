"""A hook of MkDocs: gives the site the folders of the repository, so that relative links work there and on GitHub.

Pages of docs/ keep that folder in their address, and the files outside it that pages link to are added.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

OUTSIDE = ('*.md', 'LICENSE', 'benchmarks/*.md', 'benchmarks/results/**/*.*', 'tests/data/README.md', 'train_configs/*')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    ours = [file for file in files if Path(file.src_dir or '') == docs]
    paths = [docs / file.src_uri for file in ours if file.inclusion.is_included()]
    paths += [path for pattern in OUTSIDE for path in sorted(root.glob(pattern)) if path.is_file()]
    moved = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in paths]
    return Files([file for file in files if file not in ours] + moved)
