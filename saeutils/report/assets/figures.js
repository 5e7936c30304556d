// Unpacks plotly.js from the page, and draws the figures, those in view first.
(() => {
  const packed = document.getElementById("plotly");
  const index = document.body.classList.contains("index");
  const print = location.hash === "#print"; // what `make report` prints to PDF
  if (print) document.body.classList.add("print");

  let plotly;
  const unpack = () => (plotly ??= (async () => {
    const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    return window.Plotly;
  })());

  async function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const { data, layout, frames } = JSON.parse(box.firstElementChild.textContent);
    const Plotly = await unpack();
    if (!index) {
      await Plotly.newPlot(box, data, layout, {
        responsive: true, displaylogo: false, staticPlot: print,
      });
      if (frames) await Plotly.addFrames(box, frames);
      // Paper does not scroll: a figure wider than the page is made smaller.
      const room = box.parentElement.clientWidth;
      if (print && layout.width > room) box.style.zoom = room / layout.width;
      return;
    }
    // A thumbnail is the figure without its words, made small.
    const { width = 560, height = 350 } = layout;
    const frame = box.parentElement;
    box.style.cssText = `width:${width}px;height:${height}px`;
    const bare = { ...layout, width, height, title: undefined, showlegend: false };
    bare.margin = { l: 40, r: 20, t: layout.annotations ? 40 : 20, b: 30 };
    await Plotly.newPlot(box, data, bare, { staticPlot: true });
    const fit = () => {
      const scale = Math.min(frame.clientWidth / width, frame.clientHeight / height);
      box.style.transform = `translate(-50%, -50%) scale(${scale})`;
    };
    fit();
    new ResizeObserver(fit).observe(frame);
  }

  const boxes = [...document.querySelectorAll(".plotly-figure")];
  if (print) boxes.forEach(draw);
  else {
    const near = new IntersectionObserver(
      (entries) => entries.forEach((e) => e.isIntersecting && draw(e.target)),
      { rootMargin: "800px" },
    );
    boxes.forEach((box) => near.observe(box));
    addEventListener("beforeprint", () => boxes.forEach(draw));
    // Then the rest, one by one, so that printing and saving find them all drawn.
    addEventListener("load", () => setTimeout(async () => {
      for (const box of boxes) await draw(box);
    }, 500));
  }

  const fold = document.getElementById("fold");
  if (fold) {
    fold.hidden = false;
    fold.onclick = () => {
      const hidden = document.body.classList.toggle("no-code");
      fold.textContent = hidden ? "Show code" : "Hide code";
    };
  }
})();
