// What the parts of the page ask of the server in the same way.

// Name of the model that is served, for who has not been told it.
export async function served(headers) {
  const response = await fetch("v1/models", { headers });
  if (!response.ok) throw new Error(await refusal(response));
  return (await response.json()).data[0].id;
}

// What a refused request is told, in a sentence.
export async function refusal(response) {
  let text = `The server answers with status ${response.status}.`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // it is somebody else's answer, as of a proxy
  }
  const after = response.headers.get("retry-after");
  return after ? `${text} (Try again in ${after} s.)` : text;
}

// Data of each server-sent event of an answer, as they come.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a \r at the end may be half of one
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // who has heard enough closes the connection
  }
}
