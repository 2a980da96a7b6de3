"""The openai SDK's own tests of the routes that are here, from its source distribution.

    pip download --no-deps --no-binary :all: openai==3.52.0 && tar xzf openai-3.52.0.tar.gz
    python -m venv sdk && sdk/bin/pip install openai==3.52.0 pytest-asyncio aiohttp rich
    NIBBLE_OPENAI_SDK=openai-3.52.0 NIBBLE_OPENAI_PYTHON=sdk/bin/python make clients

They were written against a mock that takes and gives anything, so some of them ask for what no
server can do; each of those is named below with its reason, and nothing else may fail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.api.conftest import Running

pytestmark = pytest.mark.slow

FILES = ("test_models.py", "test_completions.py", "chat/test_completions.py", "test_embeddings.py")
EXPECTED = {
    r"all_params_overload": "a bias of the token 'foo', max_tokens 0",
    r"chat/.*_(retrieve|update|list|delete)": "stored completions: nothing is stored here",
    r"chat/.*_list_with_all_params": "stored completions: nothing is stored here",
    r"models.*delete": "the model that they delete does not exist",
    r"embeddings.*_create\[(strict|aiohttp)\]": "base64, which the client asks for and strict "
    "validation then takes for no list of numbers",
}


def test_its_own_tests(mini: Running) -> None:
    source = os.environ.get("NIBBLE_OPENAI_SDK")
    if source is None:
        pytest.skip("NIBBLE_OPENAI_SDK names no unpacked source of the openai SDK")
    python = str(Path(os.environ.get("NIBBLE_OPENAI_PYTHON", sys.executable)).absolute())
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-q", "-rf", "-c", os.devnull, "--rootdir", "."),
            *("-p", "no:cacheprovider", "-o", "asyncio_mode=auto"),
            *("-o", "asyncio_default_fixture_loop_scope=session"),
            *(f"tests/api_resources/{name}" for name in FILES),
        ],
        cwd=Path(source),
        env={**os.environ, "TEST_API_BASE_URL": f"{mini.url}/v1"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    surprises = [one for one in failed if not any(re.search(known, one) for known in EXPECTED)]
    assert not surprises, "\n".join(surprises)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) >= 120, done.stdout[-300:]
