"""A browser with ComfyUI's page in it, to see and do what a person sees and does."""

import json
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Locale": "en",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
SIZE = {"width": 1600, "height": 900}
PATIENCE = 120_000  # milliseconds; a busy machine is slow

READY = "() => window.app?.extensionManager && LiteGraph.registered_node_types.FasterCache && app.graph?.nodes.length"
FIT = """() => {
    const boxes = app.graph.nodes.map((node) => node.boundingRect);
    const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
    const [right, bottom] = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])));
    app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], { zoom: 0.96 });
    app.canvas.setDirty(true, true);
}"""
RUN = """(patience) => new Promise((done, fail) => {
    app.api.addEventListener("execution_success", () => done(), { once: true });
    app.api.addEventListener("execution_error", ({ detail }) => fail(detail.exception_message), { once: true });
    setTimeout(() => fail("the graph was refused or took too long"), patience);
    app.queuePrompt(0);
})"""
TEXTS = """() => Object.fromEntries(app.graph.nodes.flatMap((node) => (node.widgets ?? [])
    .filter((widget) => widget.name === "fastercache_text")
    .map((widget) => [node.type, widget.element.textContent])))"""


class Editor:
    """ComfyUI's page. `errors` collects what goes wrong in it."""

    def __init__(self, page, host, settings):
        self.page, self.url, self.errors = page, host.url, []
        page.set_default_timeout(PATIENCE)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.request.post(f"{host.url}/settings", data={**SETTINGS, **settings})
        page.goto(host.url, wait_until="commit")
        page.wait_for_function(READY)

    def _note(self, message):
        """Keep an error that names our script or extension; the page's own are not ours to judge."""
        told = f"{message.text} {message.location['url']}"
        if message.type == "error" and ("fastercache.js" in told or "FasterCache.Report" in told):
            self.errors.append(message.text)

    def load(self, workflow):
        """Open a workflow, as if its file were dropped on the page."""
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.settle()

    def add(self, *types):
        """Start an empty workflow with one node of each type."""
        self.page.evaluate(
            """(types) => {
            app.graph.clear();
            types.forEach((type, i) => {
                const node = LiteGraph.createNode(type);
                node.pos = [380 * (i % 4), 420 * Math.floor(i / 4)];
                app.graph.add(node);
            });
        }""",
            types,
        )
        self.fit()

    def fit(self):
        """Bring the whole graph into view."""
        self.page.evaluate(FIT)
        self.settle()

    def settle(self):
        """Give the page the time to draw."""
        self.page.wait_for_timeout(1000)

    def saved(self):
        """The workflow as "Save" would write it."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def exported(self):
        """The workflow as "Export" and as "Export (API)" write it."""
        both = json.loads(self.page.evaluate("async () => JSON.stringify(await app.graphToPrompt())"))
        return both["workflow"], both["output"]

    def set(self, title, **values):
        """Type values into the widgets of the nodes with this title."""
        self.page.evaluate(
            """([title, values]) => {
            for (const node of app.graph.nodes.filter((node) => node.title === title))
                for (const widget of node.widgets) widget.value = values[widget.name] ?? widget.value;
        }""",
            [title, values],
        )

    def run(self):
        """Press "Run" and wait for the end."""
        self.page.evaluate(RUN, PATIENCE)
        self.settle()

    def complaints(self):
        """What the page warns of in its corner or in a dialog."""
        return self.page.locator(".p-toast-message, .p-dialog").all_inner_texts()

    def texts(self):
        """{node type: the text on it} of this pack's nodes."""
        return self.page.evaluate(TEXTS)

    def send(self, event, detail):
        """Let the page believe that the server sent an event."""
        self.page.evaluate("""([event, detail]) => app.api.dispatchCustomEvent(event, detail)""", [event, detail])


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, closed before the tests that need an event loop of their own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is missing")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine (Debian, Ubuntu: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_editor(chromium, host):
    """Opens the page: open_editor({setting: value}) -> Editor."""

    def open_page(settings=()):
        return Editor(chromium.new_page(viewport=SIZE), host, dict(settings))

    return open_page


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def editor(request, open_editor):
    """The page, once with each of its two renderers."""
    editor = open_editor({"Comfy.VueNodes.Enabled": request.param})
    yield editor
    editor.page.close()
