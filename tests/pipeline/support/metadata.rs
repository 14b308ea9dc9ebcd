//! Photos that carry a marker in every field that metadata has a place for.
//!
//! Formats: TIFF 6.0 and EXIF 2.32, JFIF, XMP part 3, CIPA DC-007 (MPF), PNG third edition, RFC 9649.

use image::ImageFormat;
use rand::RngExt;

use super::mole;

/// A field's name, and the bytes that stand in it.
pub type Marker = (String, Vec<u8>);

/// A photo whose metadata is made of markers.
pub struct Marked {
    pub name: &'static str,
    pub content_type: &'static str,
    pub bytes: Vec<u8>,
    pub markers: Vec<Marker>,
    /// From the middle of the pixels: these are stored, and are for no log.
    pub pixels: Vec<u8>,
}

impl Marked {
    fn new(name: &'static str, content_type: &'static str) -> Self {
        Self { name, content_type, bytes: Vec::new(), markers: Vec::new(), pixels: Vec::new() }
    }

    /// New random text that stands for a field.
    fn text(&mut self, field: &str) -> Vec<u8> {
        let text: Vec<u8> = (0..24).map(|_| rand::rng().random_range(b'a'..=b'z')).collect();
        self.markers.push((format!("{} {field}", self.name), text.clone()));
        text
    }

    /// The same in any bytes.
    fn binary(&mut self, field: &str) -> Vec<u8> {
        let bytes = rand::rng().random::<[u8; 24]>().to_vec();
        self.markers.push((format!("{} {field}", self.name), bytes.clone()));
        bytes
    }

    fn utf16(&mut self, field: &str) -> Vec<u8> {
        self.text(field).into_iter().flat_map(|byte| [byte, 0]).collect()
    }

    fn keep_pixels(&mut self, plain: &[u8]) {
        self.pixels = plain[plain.len() / 2..][..32].to_vec();
    }
}

fn mole_as(format: ImageFormat) -> Vec<u8> {
    let picture = image::load_from_memory(&mole()).unwrap().into_rgb8();
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A directory of a little-endian TIFF at `at`: (tag, type, value) and the next directory's place.
fn directory(at: usize, entries: &[(u16, u16, Vec<u8>)], next: usize) -> Vec<u8> {
    let mut head = (entries.len() as u16).to_le_bytes().to_vec();
    let mut data = Vec::new();
    let data_at = at + 2 + entries.len() * 12 + 4;
    for (tag, kind, value) in entries {
        let size = [0, 1, 1, 2, 4, 8, 1, 1][usize::from(*kind)];
        head.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
        head.extend(((value.len() / size) as u32).to_le_bytes());
        let mut field = value.clone();
        if value.len() > 4 {
            field = ((data_at + data.len()) as u32).to_le_bytes().to_vec();
            data.extend_from_slice(value);
            data.resize(data.len().next_multiple_of(2), 0);
        }
        field.resize(4, 0);
        head.extend(field);
    }
    head.extend((next as u32).to_le_bytes());
    [head, data].concat()
}

/// A TIFF block with device, GPS place, maker note, comment, and a thumbnail of its own.
fn exif(marked: &mut Marked) -> Vec<u8> {
    let long = |value: usize| (value as u32).to_le_bytes().to_vec();
    let mut thumbnail = mole_as(ImageFormat::Jpeg)[..400].to_vec();
    thumbnail.extend(marked.binary("thumbnail"));
    let mut block = b"II*\0\0\0\0\0".to_vec();
    let gps = block.len();
    let place =
        [(1, 2, b"N\0".to_vec()), (2, 5, marked.binary("GPS latitude")), (4, 5, marked.binary("GPS longitude"))];
    block.extend(directory(gps, &place, 0));
    let details = block.len();
    let comment = [b"UNICODE\0".to_vec(), marked.utf16("user comment")].concat();
    let fields =
        [(0x927C, 7, marked.binary("maker note")), (0x9286, 7, comment), (0xA431, 2, marked.text("serial number"))];
    block.extend(directory(details, &fields, 0));
    let thumbnail_at = block.len();
    block.extend(&thumbnail);
    let second = block.len();
    block.extend(directory(second, &[(0x0201, 4, long(thumbnail_at)), (0x0202, 4, long(thumbnail.len()))], 0));
    let first = block.len();
    let device = [
        (0x010F, 2, marked.text("device")),
        (0x0112, 3, vec![1, 0]),
        (0x013B, 2, marked.text("artist")),
        (0x8769, 4, long(details)),
        (0x8825, 4, long(gps)),
    ];
    block.extend(directory(first, &device, second));
    block[4..8].copy_from_slice(&long(first));
    block
}

fn segment(marker: u8, payload: &[u8]) -> Vec<u8> {
    [&[0xFF, marker][..], &((payload.len() + 2) as u16).to_be_bytes(), payload].concat()
}

fn jpeg() -> Marked {
    let mut marked = Marked::new("JPEG", "image/jpeg");
    let plain = mole_as(ImageFormat::Jpeg);
    let mut bytes = plain[..2].to_vec();
    let jfif_thumbnail = [b"JFIF\0\x01\x01\0\0\x01\0\x01\x08\x01", &marked.binary("JFIF thumbnail")[..]].concat();
    let mpf = [b"MPF\0II*\0\x08\0\0\0", &marked.binary("MPF index")[..]].concat();
    for (marker, payload) in [
        (0xE0, jfif_thumbnail),
        (0xE1, [b"Exif\0\0", &exif(&mut marked)[..]].concat()),
        (0xE1, [b"http://ns.adobe.com/xap/1.0/\0<x>", &marked.text("XMP")[..]].concat()),
        (
            0xE1,
            [b"http://ns.adobe.com/xmp/extension/\0", &[b'0'; 32][..], &[0; 8], &marked.text("extended XMP")[..]]
                .concat(),
        ),
        (0xE2, [b"ICC_PROFILE\0\x01\x01", &marked.text("ICC profile")[..]].concat()),
        (0xE2, mpf),
        (0xED, [b"Photoshop 3.0\x008BIM\x04\x04", &marked.text("IPTC")[..]].concat()),
        (0xEE, [b"Adobe\0\x64\0\0\0\0\x01", &marked.text("Adobe segment")[..]].concat()),
        (0xEB, marked.text("unknown segment")),
        (0xFE, marked.text("comment")),
    ] {
        bytes.extend(segment(marker, &payload));
    }
    bytes.extend(&plain[2..]);
    let mut second = plain.clone();
    second.splice(2..2, segment(0xE1, &[b"Exif\0\0", &marked.binary("second picture's EXIF")[..]].concat()));
    bytes.extend(second);
    bytes.extend(marked.text("trailer"));
    marked.keep_pixels(&plain);
    Marked { bytes, ..marked }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let named = [kind, data].concat();
    [&(data.len() as u32).to_be_bytes(), &named[..], &crc32(&named).to_be_bytes()].concat()
}

fn png() -> Marked {
    let mut marked = Marked::new("PNG", "image/png");
    let plain = mole();
    // The signature and IHDR take the first 33 bytes, IEND the last 12.
    let mut bytes = plain[..33].to_vec();
    // A stored block of deflate leaves text as it is.
    let stored = |text: &[u8]| {
        [b"\x78\x01\x01", &(text.len() as u16).to_le_bytes()[..], &(!(text.len() as u16)).to_le_bytes(), text, &[0; 4]]
            .concat()
    };
    for (kind, data) in [
        (b"eXIf", exif(&mut marked)),
        (b"tEXt", [b"Comment\0", &marked.text("tEXt")[..]].concat()),
        (b"zTXt", [b"Comment\0\0", &stored(&marked.text("zTXt"))[..]].concat()),
        (b"iTXt", [b"XML:com.adobe.xmp\0\0\0\0\0", &marked.text("iTXt")[..]].concat()),
        (b"tIME", vec![7, 0xEA, 1, 2, 3, 4, 5]),
        (b"iCCP", [&marked.text("iCCP name")[..], b"\0\0", &stored(&marked.text("iCCP profile"))].concat()),
        (b"prVt", marked.binary("private chunk")),
    ] {
        bytes.extend(chunk(kind, &data));
    }
    bytes.extend(&plain[33..plain.len() - 12]);
    bytes.extend(chunk(b"tEXt", &[b"Late\0", &marked.text("late tEXt")[..]].concat()));
    bytes.extend(&plain[plain.len() - 12..]);
    bytes.extend(marked.text("trailer"));
    marked.keep_pixels(&plain);
    Marked { bytes, ..marked }
}

fn webp() -> Marked {
    let mut marked = Marked::new("WebP", "image/webp");
    let picture = image::load_from_memory(&mole()).unwrap();
    let plain = mole_as(ImageFormat::WebP);
    let side = |side: u32| (side - 1).to_le_bytes()[..3].to_vec();
    let canvas = [vec![0x2C, 0, 0, 0], side(picture.width()), side(picture.height())].concat();
    let mut body = b"WEBP".to_vec();
    let mut push = |kind: &[u8; 4], data: Vec<u8>| {
        body.extend([kind, &(data.len() as u32).to_le_bytes()[..], &data].concat());
        body.resize(body.len() + data.len() % 2, 0);
    };
    push(b"VP8X", canvas);
    push(b"ICCP", marked.text("ICCP"));
    push(b"VP8L", plain[20..].to_vec());
    push(b"EXIF", exif(&mut marked));
    push(b"XMP ", marked.text("XMP"));
    push(b"note", marked.binary("unknown chunk"));
    let mut bytes = [b"RIFF", &(body.len() as u32).to_le_bytes()[..], &body].concat();
    bytes.extend(marked.text("trailer"));
    marked.keep_pixels(&plain);
    Marked { bytes, ..marked }
}

/// A photo of each format.
pub fn marked_photos() -> Vec<Marked> {
    vec![jpeg(), png(), webp()]
}
