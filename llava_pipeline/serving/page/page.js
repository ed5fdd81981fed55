// The chat page: one picture, questions about it, answers as they come. What the model or the server says goes into the
// page as text nodes only, never as HTML. Nothing here speaks to another host.

const POLL = 15_000, MAX_TOKENS = 64
const MAX_SIDE = 1568, MAX_SENT = 4e6, MAX_FILE = 50e6, MAX_PIXELS = 120e6
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp"] // the rest is drawn anew: servers read few formats
const UNREADABLE = { heic: "HEIC", heif: "HEIC", svg: "SVG" }
const LEADS = {
    408: "The server waited too long.", 413: "That is too large for the server.", 415: "The server cannot read that.",
    429: "The server is busy.", 503: "The server is not ready.",
}
const $ = (id) => document.getElementById(id)

let models = [] // those served under an alias, the default first
let picture = null // {url: a data: URL as it is sent}
let turns = [] // of this conversation: {question, answers: {alias: text}}
let running = null // AbortController of the answers being written
let arrivals = 0 // counts pictures, so that a slow one does not replace a later one
let refusedKey = false // the person closed the key form: polls stay quiet until the next question

// ---- the server ----

class Refusal extends Error {
    constructor(message, { status = 0, wait = 0, again = false } = {}) {
        super(message)
        Object.assign(this, { status, wait, again })
    }
}

let asking = null // one form for all requests that wait for a key
function askForKey(wrong) {
    asking ??= new Promise((resolve) => {
        const before = document.activeElement
        $("key-why").textContent = wrong ? "That key was not accepted." : "It stays in this tab, and is forgotten when you close it."
        $("key-input").value = ""
        $("key").returnValue = ""
        $("key").onclose = () => {
            asking = null
            const key = $("key").returnValue
            $("key-input").value = ""
            refusedKey = !key
            if (key) sessionStorage.setItem("key", key)
            before?.focus?.()
            resolve(key)
        }
        $("key").showModal()
    })
    return asking
}

async function request(path, options = {}, quiet = false) {
    for (;;) {
        const key = sessionStorage.getItem("key")
        const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) }
        let response
        try {
            response = await fetch(path, { ...options, headers })
        } catch (error) {
            if (error.name === "AbortError") throw error
            throw new Refusal("The server cannot be reached.", { again: true })
        }
        if (response.ok) return response
        if (response.status === 401) {
            // Another request may have brought the key meanwhile: then simply try again.
            if (key !== sessionStorage.getItem("key")) continue
            if (!(quiet && refusedKey) && (await askForKey(Boolean(key)))) continue
            throw new Refusal("The server asks for an API key.", { status: 401, again: true })
        }
        throw await refusal(response)
    }
}

async function refusal(response) {
    const { status } = response
    const message = (await response.json().catch(() => null))?.error?.message ?? (LEADS[status] ? "" : `The server answered ${status}.`)
    const wait = Math.min(Number(response.headers.get("Retry-After")) || 0, 120)
    const again = [408, 429].includes(status) || status >= 500
    return new Refusal([LEADS[status], message].filter(Boolean).join(" "), { status, wait, again })
}

// The data of each server-sent event; comments (": ping") have none.
async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    let rest = ""
    for (;;) {
        const { done, value } = await reader.read()
        if (done) return
        const lines = (rest + value).split(/\r\n|\n/)
        rest = lines.pop()
        for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim()
    }
}

// What was said before the turn, as this model said it where it did; the picture goes with the first question alone.
function messagesFor(alias, turn) {
    const messages = []
    for (const past of turn.conversation.slice(0, turn.conversation.indexOf(turn))) {
        const answer = past.answers[alias] || Object.values(past.answers)[0]
        if (answer) messages.push({ role: "user", content: past.question }, { role: "assistant", content: answer })
    }
    messages.push({ role: "user", content: turn.question })
    messages[0].content = [
        { type: "image_url", image_url: { url: turn.picture.url } },
        { type: "text", text: messages[0].content },
    ]
    return messages
}

// ---- asking ----

async function ask(question, truth = null) {
    if (running || !question) return
    if (!picture) {
        refuse("Choose a picture first: every question is about one.")
        return $("file").focus()
    }
    refusedKey = false
    const turn = { question, picture, answers: {}, conversation: turns }
    turns.push(turn)
    const item = stamp("turn")
    item.querySelector(".question").textContent = question
    const chosen = document.querySelector("#who input:checked")?.value
    const aliases = chosen === "both" ? models.slice(0, 2) : [models.find((m) => m.alias === chosen) ?? models[0]]
    const panels = aliases.map((model) => answerPanel(model?.alias ?? "champion"))
    item.querySelector(".answers").append(...panels)
    $("turns").append(item)
    $("welcome").hidden = true
    $("anew").hidden = false
    item.scrollIntoView({ block: "nearest" })
    await answerAll(turn, panels)
    if (truth) {
        item.querySelector(".truth").textContent = `The true answer: ${truth}`
        item.querySelector(".truth").hidden = false
    }
}

async function answerAll(turn, panels) {
    const mine = (running = new AbortController())
    busy(true)
    say("Answering")
    await Promise.all(panels.map((panel) => answer(turn, panel, mine.signal)))
    if (running !== mine) return // a new conversation has begun meanwhile
    running = null
    busy(false)
    say(panels.map((p) => `${p.querySelector(".alias").textContent}: ${p.querySelector(".problem").textContent || p.querySelector(".text").textContent}`).join(". "))
    panels[0].closest("li")?.scrollIntoView({ block: "nearest" })
}

function answerPanel(alias) {
    const panel = stamp("answer")
    panel.dataset.alias = alias
    panel.querySelector(".alias").textContent = titled(alias)
    panel.querySelector(".copy").onclick = () => copy(panel.querySelector(".text"))
    return panel
}

async function answer(turn, panel, signal) {
    const find = (name) => panel.querySelector(name)
    const { alias } = panel.dataset
    const text = new Text()
    const started = performance.now()
    const meta = { version: "", first: "", tokens: "", end: "" }
    const tell = () => (find(".meta").textContent = Object.values(meta).filter(Boolean).join(" · "))
    find(".text").replaceChildren(text)
    find(".text").ariaBusy = "true"
    find(".problem").hidden = find(".again").hidden = find(".copy").hidden = true
    find(".problem").textContent = ""
    tell()
    try {
        const response = await request("/v1/chat/completions", {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify({
                model: alias, stream: true, stream_options: { include_usage: true }, max_tokens: MAX_TOKENS,
                messages: messagesFor(alias, turn),
            }),
            signal,
        })
        let ended = false
        for await (const data of events(response)) {
            if (data === "[DONE]") { ended = true; break }
            const chunk = JSON.parse(data)
            if (chunk.error) throw new Refusal(`The answer broke off. ${chunk.error.message ?? ""}`, { again: true })
            if (chunk.model) named(panel, meta, chunk.model)
            if (chunk.usage) meta.tokens = `${chunk.usage.completion_tokens} tokens`
            const choice = chunk.choices?.[0]
            if (choice?.delta?.content) {
                meta.first ||= `first token after ${((performance.now() - started) / 1000).toFixed(2)} s`
                text.appendData(choice.delta.content)
            }
            if (choice?.finish_reason === "length") meta.end = "cut short here"
            tell()
        }
        if (!ended) throw new Refusal("The connection ended before the answer did.", { again: true })
        if (!text.data.trim()) meta.end = "it said nothing"
    } catch (error) {
        if (signal.aborted) meta.end = "stopped"
        else problem(turn, panel, error)
    }
    turn.answers[alias] = text.data.trim()
    find(".text").ariaBusy = "false"
    find(".copy").hidden = !text.data
    tell()
}

function named(panel, meta, name) {
    meta.version = panel.dataset.model = name
    const version = name.match(/-v(\d+)$/)?.[1]
    panel.querySelector(".version").textContent = version ? `version ${version}` : ""
}

function problem(turn, panel, error) {
    const [sentence, button] = [panel.querySelector(".problem"), panel.querySelector(".again")]
    sentence.textContent = error instanceof Refusal ? error.message : "The server's answer could not be read."
    sentence.hidden = false
    button.hidden = !(error.again ?? true)
    button.onclick = () => {
        if (running || button.ariaDisabled === "true") return
        refusedKey = false
        $("question").focus()
        answerAll(turn, [panel])
    }
    // Asking again before the server is ready for it would only be refused again.
    const until = performance.now() + (error.wait ?? 0) * 1000
    const count = () => {
        const left = Math.ceil((until - performance.now()) / 1000)
        button.ariaDisabled = String(left > 0)
        button.textContent = left > 0 ? `Try again in ${left} s` : "Try again"
        if (left > 0 && button.isConnected) setTimeout(count, 250)
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
    arrivals++
    turns = []
    picture = null
    $("turns").replaceChildren()
    $("picture").hidden = $("anew").hidden = true
    $("picture").removeAttribute("src")
    $("invite").hidden = $("welcome").hidden = false
    $("caption").textContent = ""
    refuse("")
    $("file").focus()
}

// ---- the picture ----

async function take(file) {
    const arrival = ++arrivals
    refuse("")
    $("stage").ariaBusy = "true"
    try {
        const taken = await prepared(file)
        if (arrival !== arrivals) return false
        show(taken)
        return true
    } catch (error) {
        if (arrival === arrivals) refuse(error instanceof Refusal ? error.message : `“${file.name}” cannot be read as a picture.`)
        return false
    } finally {
        $("stage").ariaBusy = "false"
        $("file").value = "" // so that the same file can be chosen again
    }
}

async function prepared(file) {
    const name = file.name || "picture"
    const format = UNREADABLE[file.type.match(/^image\/(heic|heif|svg)/)?.[1] ?? name.toLowerCase().match(/\.(heic|heif|svg)$/)?.[1]]
    if (format) throw new Refusal(`“${name}” is ${format}, which cannot be read here. Save it as PNG or JPEG.`)
    if (file.type && !file.type.startsWith("image/")) throw new Refusal(`“${name}” is not a picture.`)
    if (file.size > MAX_FILE) throw new Refusal(`“${name}” has ${Math.round(file.size / 1e6)} MB; 50 MB is the most.`)
    if (!file.size) throw new Refusal(`“${name}” is empty.`)
    const [width, height] = await sizeOf(file)
    if (width * height > MAX_PIXELS) throw new Refusal(`“${name}” has ${width} × ${height} pixels, which is too many.`)
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height))
    const fits = scale === 1 && file.size <= MAX_SENT && SENT_AS_IS.includes(file.type)
    const to = [width, height].map((side) => Math.max(1, Math.round(side * scale)))
    const blob = fits ? file : await drawn(file, ...to)
    const note = scale < 1 ? `, scaled to ${to[0]} × ${to[1]}` : fits ? "" : ", saved anew to send less"
    return { url: await dataUrl(blob), caption: `${name} · ${width} × ${height}${note}` }
}

// The header tells the size: a small file of a billion pixels is refused before anything decodes it.
async function sizeOf(file) {
    const image = new Image()
    image.src = URL.createObjectURL(file)
    try {
        await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject }))
        return [image.naturalWidth, image.naturalHeight]
    } finally {
        URL.revokeObjectURL(image.src)
    }
}

async function drawn(file, width, height) {
    // From the file, not from an <img>: browsers then decode beside the page, which goes on answering.
    const bitmap = await createImageBitmap(file, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" })
    const canvas = Object.assign(document.createElement("canvas"), { width, height })
    const context = canvas.getContext("2d")
    context.fillStyle = "white" // JPEG has no transparency
    context.fillRect(0, 0, width, height)
    context.drawImage(bitmap, 0, 0)
    bitmap.close()
    return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92))
}

function dataUrl(blob) {
    return new Promise((resolve, reject) => {
        const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: reject })
        reader.readAsDataURL(blob)
    })
}

function show(taken) {
    if (turns.length) {
        stop() // what is being said is about the earlier picture
        turns = []
        const line = Object.assign(document.createElement("li"), { className: "divider", textContent: "Another picture: a new conversation" })
        $("turns").append(line)
    }
    picture = { url: taken.url }
    $("picture").src = taken.url
    $("picture").hidden = false
    $("invite").hidden = true
    $("caption").textContent = taken.caption
    $("anew").hidden = false
    say(`Picture ready. ${taken.caption}`)
    $("question").focus({ preventScroll: true })
}

function refuse(sentence) {
    $("refused").textContent = sentence
    $("refused").hidden = !sentence
}

// ---- what is served ----

async function poll() {
    if (document.hidden) return
    try {
        const { data } = await (await request("/v1/models", {}, true)).json()
        const served = data.filter((model) => model.alias).sort((a, b) => Boolean(b.default) - Boolean(a.default))
        serve(served.length ? served : data.slice(0, 1))
        const ready = await fetch("/readyz").then((response) => response.json())
        notice("error", ready.last_error && `Still serving version ${ready.version}: the newer one was refused. ${ready.last_error}`)
        notice("away", "")
    } catch (error) {
        notice("away", error instanceof Refusal ? error.message : "The server cannot be reached; trying again.")
    }
}

function serve(served) {
    const swapped = served.filter((model) => models.some((m) => m.alias === model.alias && m.version !== model.version))
    if (swapped.length) {
        notice("swap", swapped.map((model) => `${titled(model.alias)}: now version ${model.version}.`).join(" "))
        setTimeout(notice, 30_000, "swap", "")
    }
    if (JSON.stringify(served) === JSON.stringify(models)) return
    models = served
    const before = document.querySelector("#who input:checked")?.value
    const choices = models.map((model) => [model.alias, titled(model.alias)])
    if (models.length > 1) choices.push(["both", "Side by side"])
    const wanted = choices.some(([value]) => value === before) ? before : choices[0]?.[0]
    const hadFocus = $("who").contains(document.activeElement)
    $("who").querySelectorAll("label").forEach((label) => label.remove())
    for (const [value, name] of choices) {
        const input = Object.assign(document.createElement("input"), { type: "radio", name: "who", value, checked: value === wanted })
        const label = document.createElement("label")
        label.append(input, Object.assign(document.createElement("span"), { textContent: name }))
        $("who").append(label)
    }
    $("who").hidden = choices.length < 2
    if (hadFocus) document.querySelector("#who input:checked")?.focus()
    $("about").hidden = !models.length
    $("about").querySelector("summary").textContent = models.map((m) => `${titled(m.alias)}: version ${m.version}`).join(" · ")
    $("versions").replaceChildren(...models.map(about))
}

const percent = (share) => `${(share * 100).toFixed(1)} %`

function about(model) {
    const { scores } = model
    const line = (tag, className, ...children) => {
        const element = Object.assign(document.createElement(tag), { className })
        element.append(...children)
        return element
    }
    const bar = (name, share, className) => {
        const fill = line("i", className)
        fill.style.inlineSize = `${Math.max(0, Math.min(1, share)) * 100}%`
        return [line("dt", "", name), line("dd", "", line("span", "bar", fill), percent(share))]
    }
    const list = line("dl", "")
    if (Number.isFinite(scores?.exact_match)) list.append(...bar("Right, with the picture", scores.exact_match, "full"))
    if (Number.isFinite(scores?.exact_match_shuffled)) list.append(...bar("Right, with another picture", scores.exact_match_shuffled, ""))
    if (Number.isFinite(scores?.likelihood)) list.append(...bar("Likelihood of the true answer", scores.likelihood, "full"))
    if (scores?.grounding_gain) list.append(line("dt", "", "What seeing adds"), line("dd", "", `${scores.grounding_gain} nats`))
    const section = line("section", "", line("h3", "", `${titled(model.alias)}, version ${model.version}`), line("p", "name", `${model.registered_model ?? model.id} ${(model.digest ?? "").slice(0, 12)}`))
    section.append(list.children.length ? list : line("p", "name", "No scores were recorded with it."))
    if (/^https?:\/\//.test(model.run_url ?? "")) {
        section.append(Object.assign(line("a", "", `Its run in MLflow`), { href: model.run_url, target: "_blank", rel: "noopener noreferrer" }))
    }
    return section
}

const notices = {}
function notice(kind, sentence) {
    notices[kind] = sentence
    const all = Object.values(notices).filter(Boolean).join(" ")
    if ($("notice").textContent !== all) $("notice").textContent = all // a screen reader hears changes only
    $("notice").hidden = !all
}

async function loadSamples() {
    const { data } = await (await request("/samples", {}, true)).json()
    for (const sample of data) {
        // By fetch, because an <img> cannot send the API key.
        const blob = await (await request(sample.picture, {}, true)).blob()
        const button = Object.assign(document.createElement("button"), { type: "button", className: "sample" })
        const image = Object.assign(document.createElement("img"), { src: URL.createObjectURL(blob), alt: "Sample picture" })
        button.append(image, Object.assign(document.createElement("span"), { textContent: sample.question }))
        button.onclick = async () => {
            const file = new File([blob], sample.picture.split("/").at(-1), { type: blob.type })
            if (await take(file)) await ask(sample.question, sample.truth)
        }
        $("samples").append(Object.assign(document.createElement("li"), {})).append(button)
        $("begin").hidden = false
    }
}

// ---- small things ----

const titled = (alias) => String(alias ?? "Model").replace(/^./, (letter) => letter.toUpperCase())
const stamp = (id) => $(id).content.firstElementChild.cloneNode(true)
const say = (sentence) => ($("status").textContent = sentence)

function busy(is) {
    const focused = document.activeElement === $("stop") || document.activeElement === $("send")
    $("send").hidden = is
    $("stop").hidden = !is
    if (focused) $(is ? "stop" : "question").focus()
}

async function copy(element) {
    try {
        await navigator.clipboard.writeText(element.textContent)
    } catch {
        // Without HTTPS, browsers offer no clipboard but at home (localhost); this old way works everywhere.
        getSelection().selectAllChildren(element)
        document.execCommand("copy")
    }
    say("Copied")
}

function wire() {
    $("ask").onsubmit = (event) => {
        event.preventDefault()
        const question = $("question").value.trim()
        if (running || !question) return $("question").focus()
        if (picture) $("question").value = ""
        ask(question)
    }
    $("question").onkeydown = (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return
        event.preventDefault()
        $("ask").requestSubmit()
    }
    document.addEventListener("keydown", (event) => event.key === "Escape" && !$("key").open && stop())
    $("stop").onclick = stop
    $("anew").onclick = beginAnew
    $("file").onchange = () => $("file").files[0] && take($("file").files[0])
    document.addEventListener("paste", (event) => {
        const file = [...(event.clipboardData?.files ?? [])][0]
        if (!file || $("key").open) return // text goes where the cursor is
        event.preventDefault()
        take(file)
    })
    let depth = 0 // dragenter and dragleave come for every element that is passed
    const highlight = (change) => document.body.classList.toggle("dragging", (depth = Math.max(0, change)) > 0)
    document.addEventListener("dragenter", () => highlight(depth + 1))
    document.addEventListener("dragleave", () => highlight(depth - 1))
    document.addEventListener("dragover", (event) => event.preventDefault())
    document.addEventListener("drop", (event) => {
        event.preventDefault() // else the browser leaves the page for the file
        highlight(0)
        if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0])
    })
    $("key-cancel").onclick = () => $("key").close("")
    $("key").querySelector("form").onsubmit = (event) => {
        event.preventDefault()
        $("key").close($("key-input").value.trim())
    }
    addEventListener("pagehide", stop) // else the page is not kept for the way back, and the server goes on for nobody
    document.addEventListener("visibilitychange", poll)
    $("about").open = matchMedia("(min-width: 60rem)").matches
}

wire()
setInterval(poll, POLL)
await poll()
loadSamples().catch(() => {}) // the page does without
