"""The description for a package index: the README, whose links lead into the repository. The rest is pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

# Where the repository is, as https://github.com/ORG/timm-harmonic. As long as it is nowhere, links there become text.
ADDRESS = ''


def _absolute(link: re.Match) -> str:
    picture, text, path = link.groups()
    if not ADDRESS:
        return '' if picture else text
    return f'{picture}[{text}]({ADDRESS}/{"raw" if picture else "blob"}/main/{path})'


readme = (Path(__file__).parent / 'README.md').read_text(encoding='utf-8')
setup(
    long_description=re.sub(r'(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]*)\)', _absolute, readme),
    long_description_content_type='text/markdown',
)
