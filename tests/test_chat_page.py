"""The chat page in headless Chromium, where it is installed: a message is sent, its answer streams into the page."""

import shutil
import subprocess

import pytest
from fastapi.responses import HTMLResponse

from keyspan.inference.engine import Engine
from keyspan.inference.server import make_app
from test_server import LIMITS, Running, load_model, write_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = """<!doctype html><body><iframe src="/" id="page"></iframe><script>
page.onload = async () => {
  const inside = page.contentDocument;
  inside.getElementById("text").value = "<b>Hello</b>";
  inside.getElementById("temperature").value = "0";
  inside.getElementById("form").requestSubmit();
  // Virtual time stands still during a request: each one waits as long as it really takes.
  const log = inside.getElementById("log"), send = inside.getElementById("send");
  for (let n = 0; n < 2000 && !(send.textContent === "Send" && log.children.length === 2); n++) await fetch("/health");
  const bold = inside.querySelectorAll("#log b").length, errors = inside.querySelectorAll("#log .error").length;
  const text = log.textContent, answer = log.children[1].textContent.length;
  document.body.innerHTML = "<pre id=found></pre>";
  found.textContent = JSON.stringify({text, bold, errors, answered: answer > 0});
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_message_is_answered_in_the_page(tmp_path):
    write_model(tmp_path)
    net, tokenizer = load_model(tmp_path, device="cpu")
    app = make_app(Engine(net, tokenizer, memory=2**22, page_size=8), "tiny", LIMITS)
    app.add_api_route("/driver", lambda: HTMLResponse(DRIVER))
    server = Running(app, LIMITS)
    try:
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        words += ["--virtual-time-budget=60000", "--dump-dom", f"{server.url}/driver"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.close()
    assert "&lt;b&gt;Hello&lt;/b&gt;" in done.stdout, "the message, as text"
    assert '"bold":0,"errors":0,"answered":true' in done.stdout
