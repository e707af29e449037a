#!/usr/bin/env bash
# What a release does, short of publishing: sdist and wheel of what is committed, checked and installed into empty
# environments. On a tag, $GITHUB_REF_NAME must be the version. The distributions are left in dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }
fail() { echo "release: $*" >&2; exit 1; }

say "what is committed"
git diff --quiet HEAD || echo "changes that are not committed are not in the release"
git clone --quiet . "$work/source"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$work/source/pyproject.toml")
newest=$(sed -n 's/^## \([0-9][^ ]*\).*$/\1/p' "$work/source/CHANGELOG.md" | head -1)
test "$version" = "$newest" || fail "pyproject.toml has version $version, CHANGELOG.md begins with $newest"
if [ "${GITHUB_REF_TYPE:-}" = tag ]; then
  test "$GITHUB_REF_NAME" = "v$version" || fail "the tag is $GITHUB_REF_NAME, the version $version"
  grep -qF "$GITHUB_SERVER_URL/$GITHUB_REPOSITORY" "$work/source/pyproject.toml" ||
    fail "[project.urls] of pyproject.toml lacks $GITHUB_SERVER_URL/$GITHUB_REPOSITORY"
fi
echo "version $version, as in CHANGELOG.md"

say "sdist, and the wheel made of it"
"$python" -m build --outdir "$work/dist" "$work/source" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$python" -m twine check --strict "$work"/dist/*
wheel=$(echo "$work"/dist/*.whl)

# Away from the checkout, so that only what is installed is imported; with the versions that the tests run against.
install() {  # NAME REQUIREMENT...
  "$python" -m venv "$work/$1"
  (cd "$work" && "$1/bin/python" -m pip install --quiet -c source/constraints.txt "${@:2}")
}

say "without extras"
install plain "$wheel"
cd "$work"
cat >feedback.jsonl <<'ROWS'
{"prompt": "What is 2 + 2?", "completion": " 4", "label": true}
{"prompt": "What is 2 + 2?", "completion": " 5", "label": false}
{"prompt": "What is 3 + 4?", "completion": " 7", "label": true}
{"prompt": "What is 3 + 4?", "completion": " 9", "label": false}
ROWS
plain/bin/bnf --help
plain/bin/bnf data check feedback.jsonl
code=0
plain/bin/bnf train --model nowhere --data feedback.jsonl --output run || code=$?
test "$code" = 2 || fail "bnf train without a backend ended with $code, expected 2"

say "with the extra torch: a short run on a model made here"
install trained torch
install trained "$wheel[torch]"
trained/bin/python -c "
import sys; sys.path.insert(0, 'source/tests')
import pathlib, tiny
tiny.make_model(pathlib.Path('model'))"
trained/bin/bnf train --backend torch --model model --data feedback.jsonl --valid-fraction 0.5 --max-steps 2 --output run
trained/bin/bnf generate --backend torch --model model --adapter run/adapter --prompt "What is 2 + 2?" --max-tokens 8
trained/bin/bnf demo --backend torch --model model --warm-up 8 --prompts 8 --held-out 4 --iterations 1 --output demo

cd - >/dev/null
rm -rf dist && cp -r "$work/dist" dist
say "release $version is ready: $(ls dist | tr '\n' ' ')"
