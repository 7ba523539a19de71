// The search of a site that is opened from a folder. Browsers start no worker from a file, so the theme's
// worker runs in a hidden frame. The theme looks for `IFrameWorker`, and fetches a script of that name from
// elsewhere where `extra.polyfills` in mkdocs.yml lists none.
if (location.protocol === "file:") {
  const deliver = (scope, data, target = scope) =>
    target.dispatchEvent(new scope.MessageEvent("message", { data: scope.structuredClone(data) }));

  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!doctype html>"; // of the page's own origin
      this.isReady = new Promise((resolve, reject) => {
        const load = (source) =>
          new Promise((loaded, failed) => {
            const script = this.frame.contentDocument.createElement("script");
            script.src = new URL(source, location.href);
            script.onload = loaded;
            script.onerror = failed;
            this.frame.contentDocument.body.append(script);
          });
        this.frame.onload = () => {
          const scope = this.frame.contentWindow;
          scope.postMessage = (data) => deliver(window, data, this);
          scope.importScripts = (...sources) =>
            sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
          load(url).then(resolve, reject);
        };
      });
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.isReady.then(() => {
        deliver(this.frame.contentWindow, data);
      });
    }
    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
