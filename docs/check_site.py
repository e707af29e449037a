"""The built site in a headless Chromium: `make docs-check`.

Every page is opened at the widths of a desktop and of a phone, in the light and in the dark scheme. It may not be wider
than its window, nothing that it asks for may be missing, and its console must stay silent.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SITE = Path(__file__).parents[1] / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (1280, 390)
SCHEMES = ("default", "slate")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
).split()
# Opens page after page in a frame of each width, and sends what it found. What is too wide is named by its innermost
# elements, but for those inside something that scrolls by itself.
SCRIPT = """<!doctype html><meta charset="utf-8"><body><script>
const scrolls = e => { for (let p = e.parentElement; p; p = p.parentElement)
  if (/auto|scroll|hidden/.test(p.ownerDocument.defaultView.getComputedStyle(p).overflowX)) return true; return false }
const look = (page, width, scheme) => new Promise(done => {
  const frame = document.createElement("iframe"); frame.width = width; frame.height = 900; frame.src = page
  frame.onload = () => setTimeout(() => {
    const inside = frame.contentDocument, root = inside.documentElement
    inside.body.setAttribute("data-md-color-scheme", scheme)
    const wide = root.scrollWidth > width ? [...inside.querySelectorAll("body *")].filter(e => !scrolls(e)
      && e.getBoundingClientRect().right > width + 1 && !e.childElementCount).map(e => e.outerHTML.slice(0, 120)) : []
    const images = [...inside.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)
    done({page, width, scheme, over: root.scrollWidth - width, wide: wide.slice(0, 3), images}); frame.remove()
  }, 150)
  document.body.append(frame)
});
(async () => { const found = []
  for (const page of PAGES) for (const width of WIDTHS) for (const scheme of SCHEMES)
    found.push(await look(page, width, scheme))
  await fetch("/found", {method: "POST", body: JSON.stringify(found)}) })()
</script>"""


class Server(ThreadingHTTPServer):
    """Serves the site and the script; keeps what the script sends and the names of what is not there."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.found: list[dict[str, Any]] = []
        self.done = threading.Event()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/script":
            super().do_GET()
            return
        pages = sorted(f"/{path.relative_to(SITE)}" for path in SITE.rglob("*.html") if path.name != "404.html")
        text = SCRIPT.replace("PAGES)", f"{json.dumps(pages)})").replace("WIDTHS)", f"{json.dumps(WIDTHS)})")
        body = text.replace("SCHEMES)", f"{json.dumps(SCHEMES)})").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        if self.path != "/favicon.ico":
            self.server.missing.append(f"{self.path}: {code}")
        super().send_error(code, message, explain)

    def log_message(self, format: str, *words: Any) -> None:
        pass


def main() -> int:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or not (SITE / "index.html").exists():
        print(f"needs the built site (make docs) and one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 2
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(f"{profile}/log", "w+") as log:
        address = f"http://127.0.0.1:{server.server_port}/script"
        process = subprocess.Popen([browser, *FLAGS, f"--user-data-dir={profile}", address], stderr=log)
        in_time = server.done.wait(timeout=600)
        process.terminate()
        process.wait()
        log.seek(0)
        said = [match[1] for match in map(re.compile(r'CONSOLE\S* "(.*)').search, log) if match]
    server.shutdown()
    faults = [*server.missing, *said] if in_time else ["the browser has not come to an end in ten minutes"]
    for one in server.found:
        where = f"{one['page']} at {one['width']} px, {one['scheme']}"
        faults += [f"{where}: {one['over']} px too wide: {' '.join(one['wide'])}"] if one["over"] > 0 else []
        faults += [f"{where}: no picture {name}" for name in one["images"]]
    print(*faults, f"{len(server.found)} views, {len(faults)} faults", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
