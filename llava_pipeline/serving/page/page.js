// The chat page: one picture, questions about it, answers as they come. What a model or the server says goes into the
// page as text nodes only, never as HTML. Nothing here speaks to another host.

const POLL = 15_000, MAX_TOKENS = 64, LONGEST_WAIT = 120
const MAX_FILE = 50e6, MAX_PIXELS = 120e6, MAX_SIDE = 1568, MAX_SENT = 4e6
// The server reads these as training did, so they travel unchanged where they are small enough.
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]
const LEADS = {
    408: "The server waited too long.", 413: "That is too large for the server.", 415: "The server cannot read that.",
    429: "The server is busy.", 503: "The server is not ready.",
}

// What an error means to a person on this page, where the server's own sentence is for programs.
const MEANS = {
    context_length_exceeded: "That is more than the model can read at once. Ask less, or begin a new conversation.",
}

let models = [] // those served under an alias, the default first
let picture = null // a data: URL, as it is sent
let turns = [] // of this conversation: {question, picture, answers: {alias: text}, conversation: turns}
let running = null // AbortController of the answers being written

const $ = (id) => document.getElementById(id)
const el = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties)
    element.append(...children) // strings become text nodes
    return element
}
const stamp = (id) => $(id).content.firstElementChild.cloneNode(true)
const titled = (alias) => alias.replace(/^./, (letter) => letter.toUpperCase())
const counted = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`
// "2.5794 [2.4574, 2.7038]" on two lines at most: the interval stays together.
const rounded = (score) => score &&
    String(score).replace(/\d+\.\d{3,}/g, (number) => Number(number).toFixed(2)).replace(", ", ",\u00a0")
const chosen = () => document.querySelector("#who input:checked")?.value
const say = (sentence) => ($("status").textContent = sentence) // to screen readers

// ---- the server ----

class Refusal extends Error {
    constructor(message, again = false, wait = 0) {
        super(message)
        Object.assign(this, { again, wait })
    }
}

let asking = null // one form for all requests that wait for a key
let keyless = false // the person closed the form: polls do not open it again, the next question does
function askForKey(wrong) {
    const [dialog, input, before] = [$("key"), $("key-input"), document.activeElement]
    return (asking ??= new Promise((resolve) => {
        $("key-wrong").hidden = !wrong
        input.value = dialog.returnValue = ""
        dialog.onclose = () => {
            const key = dialog.returnValue
            input.value = ""
            asking = null
            keyless = !key
            if (key) sessionStorage.setItem("api-key", key)
            if (key) setTimeout(poll)
            before?.focus()
            resolve(key)
        }
        dialog.showModal()
    }))
}

async function request(path, options = {}, quiet = false) {
    for (;;) {
        const key = sessionStorage.getItem("api-key")
        const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) }
        const response = await fetch(path, { ...options, headers }).catch((error) => {
            throw error.name === "AbortError" ? error : new Refusal("The server cannot be reached.", true)
        })
        if (response.ok) return response
        if (response.status !== 401) throw await refusal(response)
        if (key !== sessionStorage.getItem("api-key")) continue // another request brought one meanwhile
        if ((quiet && keyless) || !(await askForKey(Boolean(key)))) throw new Refusal("The server asks for a key.", true)
    }
}

async function refusal(response) {
    const { status, headers } = response
    const { message, code } = (await response.json().catch(() => null))?.error ?? {}
    const sentence = [LEADS[status], MEANS[code] ?? message].filter(Boolean).join(" ") || `The server answered ${status}.`
    const wait = Math.min(Number(headers.get("Retry-After")) || 0, LONGEST_WAIT)
    return new Refusal(sentence, status === 408 || status === 429 || status >= 500, wait)
}

// The data of each server-sent event; comments (": ping") have none.
async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    try {
        for (let rest = ""; ;) {
            const { done, value } = await reader.read()
            if (done) return
            const lines = (rest + value).split("\n")
            rest = lines.pop()
            for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim()
        }
    } finally {
        reader.cancel().catch(() => {})
    }
}

// What was said before the turn, as this model said it where it did; the picture goes with the first question alone.
function messagesFor(alias, turn) {
    const messages = []
    for (const past of turn.conversation.slice(0, turn.conversation.indexOf(turn))) {
        const answer = past.answers[alias] || Object.values(past.answers).find(Boolean)
        if (answer) messages.push({ role: "user", content: past.question }, { role: "assistant", content: answer })
    }
    messages.push({ role: "user", content: turn.question })
    const [first] = messages
    first.content = [{ type: "image_url", image_url: { url: turn.picture } }, { type: "text", text: first.content }]
    return messages
}

// ---- asking ----

function ask(question, truth) {
    const turn = { question, picture, answers: {}, conversation: turns }
    const item = stamp("turn")
    const both = chosen() === "both" ? models.slice(0, 2) : [models.find((m) => m.alias === chosen()) ?? models[0]]
    const panels = both.map((model) => answerPanel(model?.alias ?? "champion"))
    turns.push(turn)
    item.querySelector(".question").textContent = question
    item.querySelector(".answers").append(...panels)
    if (truth) item.append(el("p", { className: "truth" }, `The true answer: ${truth}`))
    $("turns").append(item)
    $("welcome").hidden = true
    $("anew").hidden = false
    return answerAll(turn, panels)
}

async function answerAll(turn, panels) {
    const mine = (running = new AbortController())
    const shown = () => panels.at(-1).closest("li")?.scrollIntoView({ block: "nearest" })
    keyless = false
    busy(true)
    say("Answering")
    shown()
    await Promise.all(panels.map((panel) => answer(turn, panel, mine.signal)))
    if (running !== mine) return // a new conversation has begun meanwhile
    running = null
    busy(false)
    shown()
    say(panels.map((panel) => panel.querySelector(".said").innerText).join(". "))
}

function answerPanel(alias) {
    const panel = stamp("answer")
    panel.dataset.alias = alias
    panel.querySelector(".alias").textContent = titled(alias)
    panel.querySelector(".copy").onclick = () => copy(panel.querySelector(".text"))
    return panel
}

function named(panel, model) {
    panel.dataset.model = panel.querySelector("h3").title = model
    panel.querySelector(".version").textContent = model.replace(/.*-v(?=\d+$)/, "version ")
}

async function answer(turn, panel, signal) {
    const find = (name) => panel.querySelector(name)
    const { alias } = panel.dataset
    const [text, started, meta] = [new Text(), performance.now(), { first: "", tokens: "", end: "" }]
    const tell = () => (find(".meta").textContent = Object.values(meta).filter(Boolean).join(" · "))
    find(".text").replaceChildren(text)
    find(".text").ariaBusy = "true"
    find(".problem").textContent = ""
    find(".problem").hidden = find(".again").hidden = find(".copy").hidden = true
    turn.answers[alias] = ""
    try {
        const response = await request("/v1/chat/completions", {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify({
                model: alias, messages: messagesFor(alias, turn), max_tokens: MAX_TOKENS,
                stream: true, stream_options: { include_usage: true },
            }),
            signal,
        })
        let done = false
        for await (const data of events(response)) {
            if ((done = data === "[DONE]")) break
            const chunk = JSON.parse(data)
            if (chunk.error) throw new Refusal(`The answer broke off. ${chunk.error.message ?? ""}`, true)
            const choice = chunk.choices?.[0]
            if (chunk.model) named(panel, chunk.model)
            if (chunk.usage) meta.tokens = counted(chunk.usage.completion_tokens, "token")
            if (choice?.finish_reason === "length") meta.end = `stops at ${MAX_TOKENS} tokens`
            if (choice?.delta?.content) {
                meta.first ||= `first token in ${((performance.now() - started) / 1000).toFixed(2)} s`
                text.appendData(choice.delta.content)
            }
            tell()
        }
        if (!done) throw new Refusal("The connection ended before the answer did.", true)
        if (!text.data.trim()) meta.end = "it said nothing"
        turn.answers[alias] = text.data.trim()
    } catch (error) {
        if (signal.aborted) [meta.end, turn.answers[alias]] = ["stopped", text.data.trim()]
        else problem(turn, panel, error instanceof Refusal ? error : new Refusal("The answer broke off.", true))
    }
    find(".text").ariaBusy = "false"
    find(".copy").hidden = !turn.answers[alias]
    tell()
}

function problem(turn, panel, { message, again, wait }) {
    const [sentence, button] = [panel.querySelector(".problem"), panel.querySelector(".again")]
    sentence.textContent = message
    sentence.hidden = false
    button.hidden = !again
    button.onclick = () => {
        if (running || button.ariaDisabled === "true") return
        $("send").focus() // this button goes away
        answerAll(turn, [panel])
    }
    // Before the time that the server named it would only refuse again.
    const until = performance.now() + wait * 1000
    const count = () => {
        const left = Math.ceil((until - performance.now()) / 1000)
        button.ariaDisabled = String(left > 0)
        button.textContent = left > 0 ? `Try again in ${left} s` : "Try again"
        if (left > 0) setTimeout(count, 250)
    }
    count()
}

function stop() {
    running?.abort()
}

function beginAnew() {
    stop()
    running = null
    busy(false)
    turns = []
    $("turns").replaceChildren()
    $("anew").hidden = true
    $("welcome").hidden = false
    $(picture ? "question" : "file").focus()
}

// ---- the picture ----

let arrivals = 0 // a picture that takes long does not replace a later one
async function take(file) {
    const arrival = ++arrivals
    refuse("")
    $("stage").ariaBusy = "true"
    try {
        const [url, caption] = await prepared(file, file.name || "picture")
        if (arrival !== arrivals) return false
        show(url, caption)
        return true
    } catch (error) {
        if (arrival === arrivals) refuse(error instanceof Refusal ? error.message : `“${file.name}” cannot be read as a picture.`)
        return false
    } finally {
        if (arrival === arrivals) $("stage").ariaBusy = "false"
    }
}

async function prepared(file, name) {
    const [unread] = `${file.type} ${name}`.match(/image\/(hei|svg)|\.(hei[cf]|svg)$/i) ?? []
    const format = /svg/i.test(unread) ? "SVG" : "HEIC"
    if (unread) throw new Refusal(`“${name}” is ${format}, which is not read here. Save it as PNG or JPEG.`)
    if (file.type && !file.type.startsWith("image/")) throw new Refusal(`“${name}” is not a picture.`)
    if (file.size > MAX_FILE) throw new Refusal(`“${name}” has ${Math.ceil(file.size / 1e6)} MB; 50 MB is the most.`)
    const [width, height] = await sizeOf(file)
    if (width * height > MAX_PIXELS) throw new Refusal(`“${name}” has ${width} × ${height} pixels, which is too many.`)
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height))
    const [w, h] = [width, height].map((side) => Math.max(1, Math.round(side * scale)))
    const fits = scale === 1 && file.size <= MAX_SENT && SENT_AS_IS.includes(file.type)
    const note = scale < 1 ? `, sent as ${w} × ${h}` : fits ? "" : ", sent as JPEG"
    return [await dataUrl(fits ? file : await drawn(file, w, h)), `${name} · ${width} × ${height}${note}`]
}

// The header tells the size: a small file of a billion pixels is refused before anything decodes it.
async function sizeOf(file) {
    const image = new Image()
    try {
        await new Promise((onload, onerror) => Object.assign(image, { onload, onerror, src: URL.createObjectURL(file) }))
        return [image.naturalWidth, image.naturalHeight]
    } finally {
        URL.revokeObjectURL(image.src)
    }
}

async function drawn(file, width, height) {
    // From the file, not from an <img>: the browser then decodes beside the page, which goes on answering.
    const bitmap = await createImageBitmap(file, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" })
    const canvas = el("canvas", { width, height })
    const context = canvas.getContext("2d")
    context.fillStyle = "white" // what is transparent is white to the server too
    context.fillRect(0, 0, width, height)
    context.drawImage(bitmap, 0, 0)
    bitmap.close()
    return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92))
}

function dataUrl(blob) {
    return new Promise((resolve, onerror) => {
        const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror })
        reader.readAsDataURL(blob)
    })
}

function show(url, caption) {
    if (turns.length) {
        stop() // what is being said is about the earlier picture
        turns = []
        $("turns").append(el("li", { className: "divider" }, "Another picture, a new conversation"))
    }
    picture = $("picture").src = url
    $("picture").hidden = false
    $("invite").hidden = true
    $("caption").textContent = caption
    say(`Picture ready: ${caption}`)
    if (matchMedia("(pointer: fine)").matches) $("question").focus({ preventScroll: true }) // no keyboard over a phone's page
}

function refuse(sentence) {
    $("refused").textContent = sentence
    $("refused").hidden = !sentence
}

// ---- what is served ----

let sampled = false
async function poll() {
    if (document.hidden || asking) return
    try {
        const { data } = await (await request("/v1/models", {}, true)).json()
        const served = data.filter((model) => model.alias).sort((a, b) => Boolean(b.default) - Boolean(a.default))
        if (JSON.stringify(served) !== JSON.stringify(models)) serve(served)
        const { ready, version, last_error: error } = await (await fetch("/readyz")).json()
        notice("error", error && `Version ${version} answers. ${error}.`)
        notice("away", ready === false && "The server has no version loaded yet.")
        if (!sampled) loadSamples((sampled = true)).catch(() => {}) // the page does without
    } catch (error) {
        notice("away", error instanceof Refusal ? error.message : "The server cannot be reached.")
    }
}

let told // the timer that takes the notice of a swap away
function serve(served) {
    const before = chosen()
    const swapped = served.filter((now) => models.some((was) => was.alias === now.alias && was.version !== now.version))
    if (swapped.length) {
        notice("swap", swapped.map((model) => `${titled(model.alias)}: now version ${model.version}.`).join(" "))
        clearTimeout(told)
        told = setTimeout(notice, 2 * POLL, "swap", "")
    }
    models = served
    const choices = models.map(({ alias }) => [alias, titled(alias)])
    if (models.length > 1) choices.push(["both", "Side by side"])
    const wanted = choices.some(([value]) => value === before) ? before : choices[0]?.[0]
    const focused = $("who").contains(document.activeElement)
    $("choices").replaceChildren(...choices.map(([value, name]) =>
        el("label", {}, el("input", { type: "radio", name: "who", value, checked: value === wanted }), el("span", {}, name))))
    $("who").hidden = choices.length < 2
    if (focused) document.querySelector("#who input:checked")?.focus()
    showScores()
}

function showScores() {
    const shown = models.filter(({ alias }) => chosen() === "both" || chosen() === alias).slice(0, 2)
    const row = (name, cell) => {
        const cells = shown.map((model) => cell(model, model.scores ?? {}))
        return cells.some(Boolean) ? [el("tr", {}, el("th", { scope: "row" }, name), ...cells.map((c) => el("td", {}, c || "–")))] : []
    }
    const share = (key, kind) => (_, { [key]: value }) => Number.isFinite(value) && bar(value, kind)
    const link = ({ run_url: href }) => /^https?:/.test(href) && el("a", { href, target: "_blank", rel: "noopener" }, "Open")
    $("about").hidden = !shown.length
    $("served").textContent = shown.map(({ alias, version }) => `${titled(alias)} is version ${version}`).join(", ")
    $("head").replaceChildren(el("td"), ...shown.map(({ alias }) => el("th", { scope: "col" }, titled(alias))))
    $("scores").replaceChildren(
        ...row("Right answers", share("exact_match")),
        ...row("With shuffled pictures", share("exact_match_shuffled", "other")),
        ...row("Likelihood of the true answer", share("likelihood")),
        ...row("What seeing adds, in nats", (_, scores) => rounded(scores.grounding_gain)),
        ...row("Digest", ({ digest }) => digest?.slice(0, 12)),
        ...row("Its run in MLflow", link),
    )
}

function bar(share, kind = "") {
    const fill = el("i")
    fill.style.inlineSize = `${Math.max(0, Math.min(1, share)) * 100}%`
    const cell = new DocumentFragment()
    cell.append(`${(share * 100).toFixed(1)} %`, el("span", { className: `bar ${kind}` }, fill))
    return cell
}

const notices = {}
function notice(kind, sentence) {
    notices[kind] = sentence
    const all = Object.values(notices).filter(Boolean).join(" ")
    if ($("notice").textContent !== all) $("notice").textContent = all // screen readers read changes
    $("notice").hidden = !all
}

async function loadSamples() {
    const { data } = await (await request("/samples", {}, true)).json()
    for (const { picture: path, question, truth } of data) {
        const blob = await (await request(path, {}, true)).blob() // an <img> could not send the API key
        const image = el("img", { src: URL.createObjectURL(blob), alt: "A sample picture." })
        const button = el("button", { type: "button", className: "sample" }, image, el("span", {}, question))
        button.onclick = async () => {
            if (running || !(await take(new File([blob], path.split("/").at(-1), { type: blob.type })))) return
            $("send").focus() // the samples go away
            ask(question, truth)
        }
        $("samples").append(el("li", {}, button))
        $("begin").hidden = false
    }
}

// ---- the person ----

function busy(is) {
    const focused = [$("send"), $("stop")].includes(document.activeElement)
    $("send").hidden = is
    $("stop").hidden = !is
    if (focused) $(is ? "stop" : "send").focus()
}

async function copy(element) {
    try {
        await navigator.clipboard.writeText(element.textContent)
    } catch { // no clipboard without HTTPS, except on localhost; the old way works everywhere
        getSelection().selectAllChildren(element)
        document.execCommand("copy")
    }
    say("Copied")
}

$("ask").onsubmit = (event) => {
    event.preventDefault()
    const question = $("question").value.trim()
    if (running || !question) return $("question").focus()
    if (!picture) {
        refuse("Choose a picture first: every question is about one.")
        return $("file").focus()
    }
    $("question").value = ""
    ask(question)
}
$("question").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return
    event.preventDefault()
    $("ask").requestSubmit()
}
$("file").onchange = () => {
    const [file] = $("file").files
    if (file) take(file)
    $("file").value = "" // so that the same file can be chosen again
}
$("key-form").onsubmit = (event) => {
    event.preventDefault()
    $("key").close($("key-input").value)
}
$("key-cancel").onclick = () => $("key").close("")
$("stop").onclick = stop
$("anew").onclick = beginAnew
$("who").onchange = showScores
$("about").open = matchMedia("(min-width: 60rem)").matches

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files") // dragged text may go where text goes
let depth = 0 // enter and leave come for every element that is passed
const drag = (change, event) => holdsFiles(event) && document.body.classList.toggle("dragging", (depth += change) > 0)
addEventListener("dragenter", (event) => drag(1, event))
addEventListener("dragleave", (event) => drag(-1, event))
addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault())
addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return
    event.preventDefault() // else the browser leaves the page for the file
    drag(-depth, event)
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0])
})
addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0]
    if (!file || $("key").open) return // text goes where the cursor is
    event.preventDefault()
    take(file)
})
addEventListener("keydown", (event) => event.key === "Escape" && !$("key").open && stop())
addEventListener("pagehide", stop) // else the server goes on for nobody, and the page is not kept for the way back
addEventListener("pageshow", poll)
addEventListener("visibilitychange", poll)
setInterval(poll, POLL)
