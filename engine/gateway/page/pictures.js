// Pictures that go with the next question: chosen, dropped or pasted, and shown until it is sent.

const byId = (id) => document.getElementById(id);
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // that the server takes
const MOST_BYTES = 11_000_000; // of all of a question, so that as text they fit into a body

export class Pictures {
  constructor() {
    this.list = []; // [{ url, name, size }]
    const input = byId("pictures");
    input.addEventListener("change", () => {
      this.add(input.files);
      input.value = "";
    });
    byId("add").addEventListener("click", () => input.click());
    byId("question").addEventListener("paste", (event) => this.given(event, event.clipboardData));
    for (const kind of ["dragover", "drop"]) {
      byId("ask").addEventListener(kind, (event) => {
        if (kind === "drop") this.given(event, event.dataTransfer);
        else if (!byId("add").hidden && event.dataTransfer.types.includes("Files")) event.preventDefault();
      });
    }
  }

  // Whether the model sees any.
  allow(sees) {
    byId("add").hidden = !sees;
  }

  given(event, data) {
    if (byId("add").hidden || !data?.files.length) return;
    event.preventDefault();
    this.add(data.files);
  }

  async add(files) {
    this.say("");
    for (const file of [...files]) { // which the browser empties when this waits
      const size = this.list.reduce((sum, each) => sum + each.size, file.size);
      if (!KINDS.includes(file.type)) this.say(`${file.name} is no PNG, JPEG, WebP or GIF.`);
      else if (size > MOST_BYTES) this.say(`${file.name} is too large: all pictures of a question may have 11 MB.`);
      else this.list.push({ url: await dataUrl(file), name: file.name, size: file.size });
    }
    this.show();
  }

  // What was chosen, which is gone then.
  take() {
    const taken = this.list;
    this.list = [];
    this.say("");
    this.show();
    return taken;
  }

  show() {
    const places = this.list.map((each) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = button.ariaLabel = `Leave out ${each.name}`;
      button.append(picture(each));
      button.addEventListener("click", () => {
        this.list = this.list.filter((other) => other !== each);
        this.show();
        byId("question").focus();
      });
      return button;
    });
    byId("chosen").replaceChildren(...places);
    byId("chosen").hidden = !places.length;
  }

  say(text) {
    byId("pictures-wrong").textContent = text;
    byId("pictures-wrong").hidden = !text;
  }
}

// An element that shows a picture.
export function picture({ url, name }) {
  const image = document.createElement("img");
  image.src = url;
  image.alt = name;
  return image;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
