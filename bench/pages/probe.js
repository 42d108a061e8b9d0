// Runs in a page behind all that it holds, in a frame, and tells the document around it what it measures.
(async () => {
  const height = document.documentElement.scrollHeight;
  const about = document.querySelector("dl.about");
  const wide = [...document.querySelectorAll(".wide")].filter((part) => part.scrollWidth > part.clientWidth + 1);
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  const sizes = [...document.querySelectorAll("svg text")].map((text) =>
    parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a);
  const facts = {
    width: innerWidth,
    height,
    overflow: document.documentElement.scrollWidth - innerWidth,
    smallest_text_px: sizes.length ? Math.min(...sizes) : null,
    has_contents: document.querySelector("nav") !== null,
    heading: document.querySelector("h1").textContent,
    about: about ? [...about.querySelectorAll("dt")].map((name) => name.textContent) : [],
    about_ends_at: about ? about.getBoundingClientRect().bottom + scrollY : null,
    uncued: wide.filter((part) => !getComputedStyle(part).backgroundImage.includes("gradient")).length,
  };
  if (window.axe) {
    const result = await axe.run(document, { resultTypes: ["violations"] });
    facts.violations = result.violations.map((rule) => `${rule.id}: ${rule.nodes.length} times, ${rule.help}`);
  }
  parent.postMessage(JSON.stringify(facts), "*");
})();
