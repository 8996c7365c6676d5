#!/bin/sh
# Fetch axe-core, the accessibility checker of tests/web/test_browser.py, into a folder: axe.sh FOLDER
set -e
mkdir -p "$1" && cd "$1"
npm pack --silent axe-core@4 >/dev/null
tar xzf axe-core-4*.tgz package/axe.min.js package/LICENSE
echo "SAMF_AXE=$1/package/axe.min.js"
